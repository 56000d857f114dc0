from cdc_outbox.demo.ledger import Ledger


def ledger() -> Ledger:
    made = Ledger()
    made.commit([("a", "1"), ("b", "2"), ("a", "3")])
    made.rolled_back.append("9")
    made.take_effects([("a", "1"), ("b", "2"), ("a", "3")])
    return made


def see(made: Ledger, *seen: tuple[str, str]) -> Ledger:
    for aggregate, event_id in seen:
        made.see(aggregate, event_id, 0.1)
    return made


def acting(*effects: tuple[str, str]) -> Ledger:
    made = see(ledger(), ("a", "1"), ("b", "2"), ("a", "3"))
    made.effects.clear()
    made.take_effects(effects)
    return made


def test_good() -> None:
    verdict = see(ledger(), ("b", "2"), ("a", "1"), ("a", "3"), ("a", "1")).verdict()
    assert verdict.good
    assert (verdict.committed, verdict.delivered, verdict.duplicates, verdict.rolled_back) == (3, 3, 1, 1)
    assert verdict.effects == 3


def test_lost() -> None:
    verdict = see(ledger(), ("a", "1"), ("a", "3")).verdict()
    assert (verdict.good, verdict.lost) == (False, 1)


def test_phantom() -> None:
    verdict = see(ledger(), ("b", "2"), ("a", "1"), ("a", "3"), ("a", "9")).verdict()
    assert (verdict.good, verdict.phantom) == (False, 1)


def test_out_of_order() -> None:
    verdict = see(ledger(), ("b", "2"), ("a", "3"), ("a", "1")).verdict()
    assert (verdict.good, verdict.out_of_order) == (False, 1)


def test_an_effect_that_is_missing() -> None:
    verdict = acting(("a", "1"), ("a", "3")).verdict()
    assert (verdict.is_delivered, verdict.good, verdict.effects_missing) == (True, False, 1)


def test_an_effect_that_is_doubled() -> None:
    verdict = acting(("a", "1"), ("b", "2"), ("b", "2"), ("a", "3")).verdict()
    assert (verdict.is_delivered, verdict.good, verdict.effects_doubled) == (True, False, 1)


def test_an_effect_of_what_was_rolled_back() -> None:
    verdict = acting(("a", "1"), ("b", "2"), ("a", "3"), ("a", "9")).verdict()
    assert (verdict.is_delivered, verdict.good, verdict.effects) == (True, False, 4)


def test_effects_out_of_order() -> None:
    verdict = acting(("a", "3"), ("b", "2"), ("a", "1")).verdict()
    assert (verdict.is_delivered, verdict.good, verdict.effects_out_of_order) == (True, False, 1)


def test_nothing_committed_proves_nothing() -> None:
    assert not Ledger().verdict().good


def test_percentiles() -> None:
    made = Ledger()
    assert made.percentiles_seconds() is None
    for number in range(100):
        made.see("a", str(number), number / 100)
    assert made.percentiles_seconds() == (0.5, 0.99)
