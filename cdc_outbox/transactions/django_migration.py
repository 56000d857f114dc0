"""A migration of Django's that runs SQL of ours; on databases that are no PostgreSQL it does nothing."""

from typing import Any

from django.db.migrations import RunSQL


class RunPostgresSQL(RunSQL):
    """Backwards it does nothing: the table may hold what nobody has read yet, and may be older than the migration."""

    def __init__(self, sql: str) -> None:
        super().__init__(sql, RunSQL.noop)

    def deconstruct(self) -> tuple[str, list[Any], dict[str, Any]]:
        return self.__class__.__qualname__, [], {"sql": self.sql}

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        if schema_editor.connection.vendor == "postgresql":
            super().database_forwards(app_label, schema_editor, from_state, to_state)
