"""The address of the MLflow server: where it is set, and what is wrong with it. Contacts no server."""

from __future__ import annotations

import os
import re
from configparser import ConfigParser
from configparser import Error as ConfigError
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from training.errors import install_extra
from training.files import writable
from training.tracking.hide_secrets import without_secrets

EXPECTED = "expected http(s)://HOST:PORT, databricks or sqlite:////FILE"


def tracking_uri() -> str | None:
    """MLFLOW_TRACKING_URI, or "databricks" on Databricks, else None."""
    on_databricks = "databricks" if os.environ.get("DATABRICKS_RUNTIME_VERSION") else None
    return os.environ.get("MLFLOW_TRACKING_URI") or on_databricks


def tracking_problems(flag: str, name: str | None) -> list[str]:
    """Problems that prevent logging to MLflow or registering under `name`, the value of `flag`. Contacts no server: one
    that is down may answer later."""
    if find_spec("mlflow") is None:
        return [
            f"MLflow is not installed. Type {install_extra('mlflow')}, or leave mlflow out of --report-to"
        ]
    problems, uri = [], tracking_uri()
    part = r"[^\s/:.]{1,255}"
    if name is not None and not re.fullmatch(rf"{part}(\.{part}\.{part})?", name):
        problems.append(f"{flag} {name!r}: expected one word, or catalog.schema.model for Unity Catalog")
    elif name and uri and uri.startswith("databricks") and name.count(".") != 2:
        problems.append(f"{flag} {name!r}: Databricks expects catalog.schema.model")
    if uri is None:
        problems.append("MLFLOW_TRACKING_URI is not set. Type export MLFLOW_TRACKING_URI=http://HOST:PORT")
    registry = os.environ.get("MLFLOW_REGISTRY_URI") if name else None
    for variable, address in (("MLFLOW_TRACKING_URI", uri), ("MLFLOW_REGISTRY_URI", registry)):
        if address is not None:
            shown = _without_password(address)
            problems += [f"{variable} {shown}: {problem}" for problem in _uri_problems(variable, address)]
    return problems


def _without_password(uri: str) -> str:
    """The address, or only its start: anything beyond a plain address may contain a mistyped password."""
    return uri if re.fullmatch(r"[\w.+:/~\[\]-]*", uri) else f"{uri.partition(':')[0][:5]}..."


def _uri_problems(variable: str, uri: str) -> list[str]:
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018  (raises for an invalid port)
    except ValueError:  # its message repeats part of the value
        return [f"is not a valid address; {EXPECTED}"]
    if parts.scheme not in ("http", "https"):
        return _store_problems(variable, uri)
    problems = []
    if not parts.hostname:
        problems.append(f"has no host; {EXPECTED}")
    if parts.password is not None:
        problems.append(
            "contains a password. Remove it, and export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if parts.query or parts.fragment:
        problems.append("has a query or fragment. Remove it; export a token as MLFLOW_TRACKING_TOKEN")
    return problems


def _store_problems(variable: str, uri: str) -> list[str]:
    """Asks MLflow whether it can use a store that is not a server. Connects to no database and no workspace."""
    import mlflow
    from mlflow.store.db.db_types import DATABASE_ENGINES
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    scheme = uri.partition(":")[0].split("+")[0]
    if scheme in DATABASE_ENGINES:
        return _database_problems(uri)
    try:
        if variable == "MLFLOW_TRACKING_URI":
            mlflow.MlflowClient(uri)
        else:
            mlflow.MlflowClient("http://127.0.0.1", registry_uri=uri)._get_registry_client()
    except UnsupportedModelRegistryStoreURIException:
        return [f"MLflow has no store of that kind; {EXPECTED}"]
    except Exception as error:  # from MLflow, or from a store that another package adds
        if urlsplit(uri).scheme in ("", "file"):
            folder = Path(urlsplit(uri).path).absolute() if uri == _without_password(uri) else "/FOLDER"
            database = f"sqlite:///{folder}/mlflow.db"
            return [
                f"is a folder, and MLflow {mlflow.__version__} refuses folders. Type export {variable}={database}"
            ]
        reason = without_secrets(str(error).replace(uri, _without_password(uri)))
        return [f"MLflow refuses it ({reason or type(error).__name__}); {EXPECTED}"]
    return _databricks_problems(uri) if scheme in ("databricks", "databricks-uc") else []


def _database_problems(uri: str) -> list[str]:
    """What a database lacks: the Python package of its driver, or a file that can be written."""
    try:
        import alembic  # noqa: F401  (creates MLflow's tables)
        from sqlalchemy import make_url

        url = make_url(uri)
        url.get_dialect().import_dbapi()
    except ImportError as error:
        own = error.name in ("alembic", "sqlalchemy")
        fix = f"Type {install_extra('mlflow')}" if own else "Install that driver with pip"
        return [f"Python has no module {error.name}, which MLflow needs for this database. {fix}"]
    except Exception:  # its message repeats the value
        return [f"is not a valid address; {EXPECTED}"]
    if url.get_backend_name() != "sqlite" or (url.database or "").startswith("file:"):
        return []
    if not url.database or url.database == ":memory:":
        return ["names no file, so everything would be lost at the end. Type sqlite:////FILE"]
    file = Path(url.database)
    if not writable(file.parent) or (file.exists() and not (file.is_file() and os.access(file, os.W_OK))):
        return [f"{file} cannot be written. Name a file in a folder of your own: sqlite:////FILE"]
    return []


def _databricks_problems(uri: str) -> list[str]:
    """Whether there are credentials of Databricks. Whether they are valid, only the workspace knows."""
    profile = uri.partition("://")[2]
    if os.environ.get("DATABRICKS_RUNTIME_VERSION") or (os.environ.get("DATABRICKS_HOST") and not profile):
        return []
    profile = profile or os.environ.get("DATABRICKS_CONFIG_PROFILE", "DEFAULT")
    name = os.environ.get("DATABRICKS_CONFIG_FILE", "~/.databrickscfg")
    config = ConfigParser(interpolation=None)
    try:
        config.read(Path(name).expanduser())
    except (OSError, ValueError, ConfigError) as error:  # its message may repeat a token
        return [
            f"{name} cannot be read ({type(error).__name__}). Correct that file, or export DATABRICKS_HOST and "
            "DATABRICKS_TOKEN"
        ]
    if config.has_section(profile) or (profile == "DEFAULT" and config.defaults()):
        return []
    return [
        f"there are no credentials of Databricks: DATABRICKS_HOST is not set, and {name} has no profile {profile}. "
        "Type databricks auth login, or export DATABRICKS_HOST and DATABRICKS_TOKEN"
    ]
