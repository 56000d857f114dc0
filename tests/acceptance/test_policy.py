"""The policy's verbs, from outside."""

import json
from pathlib import Path

import pytest

from support import command
from support.policies import EXAMPLE


def test_a_policy_that_is_in_order(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_bytes(EXAMPLE)
    done = command.run({}, "policy", "check", str(file))
    assert (done.exit_code, done.err) == (0, "")
    assert done.out.startswith(f"{file}: in order, 7 rules, SHA-256 ")
    told = json.loads(command.run({}, "policy", "check", str(file), "--json").out)
    assert (told["rules"], told["mistakes"], told["warnings"]) == (7, [], [])


def test_mistakes_and_warnings_have_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    rules = '[[rule]]\nid = "a"\nverdict = "allow"\n\n[[rule]]\nid = "b"\nverdict = "deny"\n'
    file.write_text(f"version = 1\n{rules}")
    done = command.run({}, "policy", "check", str(file))
    assert done.exit_code == 0
    assert done.err == f"{file}:6: warning: rule b: it can never match: rule a takes all that it could\n"
    file.write_text(f'version = 1\n{rules}when = {{ "payload.x" = {{ over = 3 }} }}\ncolour = "\\u001b[31m"\n')
    done = command.run({}, "policy", "check", str(file))
    assert (done.exit_code, done.out) == (4, "")
    first, second, last = done.err.splitlines()
    assert first == f"{file}:9: rule b: unknown operator 'over' (eq, ne, gt, ge, lt, le, in, exists)"
    assert second.startswith(f"{file}:10: rule b: unknown key 'colour' with verdict 'deny' (id, mode, when, ")
    assert last == f"error: policy {file} has 2 mistakes -- each mistake stands above, with its line"
    told = json.loads(command.run({}, "policy", "check", str(file), "--json").out)
    assert [mistake["line"] for mistake in told["mistakes"]] == [9, 10]


@pytest.mark.parametrize(("name", "named"), [("nope.toml", "no such file"), (".", "is a directory")])
def test_a_policy_that_cannot_be_read(tmp_path: Path, name: str, named: str) -> None:
    done = command.run({}, "policy", "check", str(tmp_path / name))
    assert done.exit_code == 2
    assert named in done.error
