"""For an application's own tests: was the event emitted, does the handler act once?

Standard library and pytest only, besides the driver that the tests use anyway. As fixtures: ``plugin``.
"""

from cdc_outbox.testing.emitted import Emitted, assert_emitted, assert_emitted_async
from cdc_outbox.testing.idempotent import assert_idempotent, assert_idempotent_async

__all__ = ["Emitted", "assert_emitted", "assert_emitted_async", "assert_idempotent", "assert_idempotent_async"]
