"""Keep passwords and tokens out of files and output."""

from __future__ import annotations

import os
import re
from typing import Any

from jsonargparse import Namespace

SECRET_KEY = re.compile(r"(^|_)(api_?key|access_?key|private_?key|token|password|passwd|secret|credentials?)$", re.I)
SECRET_VARIABLE = re.compile(r"KEY|TOKEN|PASSW|SECRET|CREDENTIAL", re.I)
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
URL_SECRET = re.compile(r"(?<=[?&])([^=&\s]*(?:key|token|passw|secret|sig|signature|credential)[^=&\s]*)=[^&\s]+", re.I)
HIDDEN = "***"


def without_secrets(value: Any, key: str = "", known: frozenset[str] | None = None) -> Any:
    """Return a copy of a configuration with ``***`` in the place of secrets.

    These values are secrets: the user and password in a URL; a parameter in a URL's query that is named as a key, token
    or signature; a value whose key ends in ``token``, ``password``, ``api_key`` or the like; and the value of an
    environment variable with such a name.
    """
    if known is None:
        known = frozenset(v for k, v in os.environ.items() if SECRET_VARIABLE.search(k) and len(v) >= 8)
    if isinstance(value, Namespace):
        return Namespace(**{k: without_secrets(v, k, known) for k, v in vars(value).items()})
    if isinstance(value, dict):
        return {without_secrets(k, "", known): without_secrets(v, str(k), known) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(item, key, known) for item in value)
    if not isinstance(value, (str, os.PathLike)):
        return value
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    clean = HIDDEN if text and SECRET_KEY.search(key) else URL_SECRET.sub(rf"\1={HIDDEN}", URL_LOGIN.sub(HIDDEN, text))
    for secret in known:
        clean = clean.replace(secret, HIDDEN)
    return value if clean == text else clean
