"""The manifest of the data that runs were trained on: what shows which tokens were read."""

import json
from pathlib import Path
from typing import Any

from nanogpt.common.errors import UserError
from nanogpt.common.manifest import MANIFEST, digest_of, read_manifest
from tools.leaderboard.strict import LARGEST, parse_object, read_bytes


def read_data_manifest(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """(bytes, facts) of a data set's manifest, checked by its one reader."""
    data = read_bytes(folder / MANIFEST, LARGEST)
    facts = parse_object(data, str(folder / MANIFEST))
    found = read_manifest_facts(folder, facts)
    return data, found


def read_manifest_facts(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The manifest's fields that the data's fingerprint covers. A char set's meta.json need not be there."""
    if facts.get("tokenizer") != "char":
        read_manifest(folder)
    needed = {"tokenizer": str, "vocab_size": int, "files": list}
    kinds = {"name": str, "split": str, "tokens": int, "bytes": int, "sha256": str}
    for name, kind in needed.items():
        if not isinstance(facts.get(name), kind):
            raise UserError(f"{folder / MANIFEST}: {name}: missing or of the wrong type")
    for one in facts["files"]:
        if not isinstance(one, dict) or any(type(one.get(name)) is not kind for name, kind in kinds.items()):
            raise UserError(
                f"{folder / MANIFEST}: files: an entry lacks a field, or has one of the wrong type"
            )
    return {"eot": None, **facts}


def fingerprint(facts: dict[str, Any]) -> str:
    """What a run that reads these files writes into its config.json: `TokenSet.fingerprint`, without the files."""
    files = sorted(facts["files"], key=lambda one: one["name"])
    listed = [
        [one["name"], one["split"], one["tokens"], one["bytes"], one["sha256"]]
        for split in ("train", "val") for one in files if one["split"] == split
    ]  # fmt: skip
    return digest_of([facts["tokenizer"], facts["vocab_size"], facts["eot"], digest_of(listed)])


def as_it_was(data: bytes, facts: dict[str, Any], wanted: object) -> tuple[bytes, dict[str, Any]]:
    """The manifest when the run with the fingerprint `wanted` read it: shards may have been added since, at the end.

    What fits no such manifest is returned as it is; the checks will say so.
    """
    train = sorted((one for one in facts["files"] if one["split"] == "train"), key=lambda one: one["name"])
    others = [one for one in facts["files"] if one["split"] != "train"]
    for count in range(len(train), 0, -1):
        earlier = {**facts, "files": [*others, *train[:count]]}
        if fingerprint(earlier) == wanted:
            return (data, facts) if count == len(train) else (json.dumps(earlier).encode(), earlier)
    return data, facts
