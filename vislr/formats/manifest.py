"""`vislr.manifest`, vislr's own part of a file's header, and what else belongs to a format there."""

from __future__ import annotations

import json
from typing import Any

from vislr.core.errors import FormatError

# 1: one component, written from a model: config and hash of the base. 2: any adapter in canonical form.
SCHEMA = 1
CANONICAL_SCHEMA = 2
MANIFEST = "vislr.manifest"
DIFFUSERS_METADATA = "lora_adapter_metadata"
# Before the keys of a head that came with the adapter's training.
AUX = "aux."


def read_manifest(text: str, path: Any) -> dict[str, Any]:
    """Parse and check a manifest.

    Raises:
        FormatError: not JSON, an unknown schema version, or a field is missing or of the wrong type.
    """
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"'{path}': its {MANIFEST} is no JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise FormatError(f"'{path}': its {MANIFEST} is a {type(manifest).__name__}, expected an object")
    if manifest.get("schema") not in (SCHEMA, CANONICAL_SCHEMA):
        given = manifest.get("schema")
        raise FormatError(f"'{path}' has schema version {given!r}; this vislr knows {SCHEMA} and {CANONICAL_SCHEMA}")
    for key, kind in (("format", str), ("kind", str), ("component", str), ("family", str), ("architecture", str),
                      ("config", dict), ("sites", dict), ("base", dict)):  # fmt: skip
        if not isinstance(manifest.get(key), kind):
            raise FormatError(
                f"'{path}': '{key}' of its {MANIFEST} is {manifest.get(key)!r}, expected a {kind.__name__}"
            )
    return manifest
