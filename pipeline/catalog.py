"""A lake's catalog of Iceberg tables: opened by name or URI, its errors in our tree. Secrets come from the environment only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import PipelineError, SpecError, StorageError, UnavailableError
from .importing import extra
from .observe import has_credentials, without_credentials
from .storage_errors import as_ours

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog

NAME = "default"
"""Of a catalog that is given by its URI; what pyiceberg assumes too, so `load_catalog(uri=...)` finds the tables again."""
_SQL = ("sqlite", "postgresql")
_FROM_ENVIRONMENT = {
    "s3.endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "s3.region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
"""What pyiceberg does not look up itself; keys it does."""
_AGAIN = "publish again: what stands in a table is not added twice"

_GONE = (
    "a file of the run (`mirrorscope verify` tells), or a table's metadata, gone with the run or warehouse that it lay in: "
    "then drop the table from the catalog and publish again"
)


@contextmanager
def opened(catalog: str, warehouse: str | None, default_warehouse: str) -> Iterator[Catalog]:
    """A catalog for the time of the block; what it and its libraries raise there is mapped to our errors.

    Args:
        catalog: A name that pyiceberg is configured with (~/.pyiceberg.yaml, PYICEBERG_CATALOG__NAME__...), or a URI.
        warehouse: Where tables keep their metadata, or what a REST catalog calls so; null for the catalog's own.
        default_warehouse: For a catalog in an SQL database that has none.

    Raises:
        SpecError: pyiceberg is not installed, or the catalog is not configured.
        UnavailableError: It does not answer.
        StorageError: It refuses.
    """
    shown = without_credentials(catalog)
    if has_credentials(catalog) or has_credentials(warehouse or ""):
        raise SpecError(
            f"{shown}: a URI with a password, which would stand in logs",
            "put it into the environment, PYICEBERG_CATALOG__DEFAULT__URI, and give --catalog default",
        )
    with extra("lake", "catalogs"):
        import pyiceberg.catalog as library
        from pyiceberg.utils.config import Config
    with _mapped(shown):
        config = Config()
        by_uri = ":" in catalog
        given: dict[str, Any] = dict(config.get_catalog_config(NAME if by_uri else catalog) or {})
        if by_uri:
            given["uri"] = catalog
        elif "uri" not in given and "type" not in given:
            raise SpecError(
                f"no catalog is configured under the name {catalog!r}; known are {config.get_known_catalogs()}",
                "give a URI (a file is sqlite:///catalog.db, a server https://...), or describe it in ~/.pyiceberg.yaml",
            )
        properties = {**_from_environment(), **given, **({"warehouse": warehouse} if warehouse else {})}
        uri = str(properties.get("uri", ""))
        if uri.startswith(_SQL):
            properties.setdefault("warehouse", default_warehouse)
        elif uri.startswith("http") and "credential" in properties:
            properties.setdefault("oauth2-server-uri", f"{uri.rstrip('/')}/v1/oauth/tokens")
        yield library.load_catalog(NAME if by_uri else catalog, **properties)


def _from_environment() -> dict[str, str]:
    found = {}
    for name, variables in _FROM_ENVIRONMENT.items():
        if value := next((os.environ[variable] for variable in variables if os.environ.get(variable)), None):
            found[name] = value
    if "s3.endpoint" in found:
        found.setdefault("s3.region", "us-east-1")  # else AWS would be asked where a bucket lies that it does not have
    return found


@contextmanager
def _mapped(catalog: str) -> Iterator[None]:
    """Map what pyiceberg, its database and HTTP libraries and its file system raise."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # what is none of their doing goes on as it was
        ours = _as_ours(catalog, error)
        if ours is None:
            raise
        raise ours from error


def _as_ours(catalog: str, error: Exception) -> PipelineError | None:
    library, kind = type(error).__module__.split(".")[0], type(error).__name__
    said = f"catalog {catalog}: {' '.join(str(error).split()) or kind}"
    if kind in ("UnauthorizedError", "ForbiddenError", "OAuthError", "AuthorizationExpiredError"):
        return StorageError(
            said,
            "its token or credential comes from the environment: PYICEBERG_CATALOG__DEFAULT__TOKEN (or __CREDENTIAL)",
        )
    if library in ("requests", "urllib3") or kind in ("ServiceUnavailableError", "TooManyRequestsError"):
        return UnavailableError(f"{said}: it does not answer", _AGAIN)
    if library == "sqlalchemy":
        return StorageError(said, "the database must be there, or its folder for one that is made")
    if library == "pyiceberg":
        return StorageError(said, _AGAIN)
    if isinstance(error, FileNotFoundError):
        return StorageError(said, _GONE)
    return as_ours(catalog, error) if isinstance(error, OSError) else None
