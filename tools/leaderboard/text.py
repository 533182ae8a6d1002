"""Text of submitters: what is taken, and how it is made harmless where it is shown.

HTML is escaped by the templates, always. A terminal gets `tools.runs.printable`; a spreadsheet gets `csv_cell`.
"""

import re
import unicodedata

from nanogpt.common.errors import UserError

DESCRIPTION, CONTRIBUTOR, CONTRIBUTORS, URL = 300, 60, 24, 300  # largest sizes
# Control and format characters (bidi marks, zero widths, ESC), line and paragraph separators, halves of pairs.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_PLACEHOLDER = re.compile(
    r"\W*((a |the |my |short |run )*(description|run|test|submission|change|what (was )?changed|title|record)"
    r"|todo.*|fixme.*|tbd|x+|asdf.*|hello,? world|example|lorem ipsum.*|describe .*|<[^<>]*>|foo|bar|none|n/?a)?\W*",
    re.IGNORECASE,
)
_URL = re.compile(r"https://([A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)(:\d{1,5})?(/[!#-&(-;=?-\[\]_a-z~]*)?")
_LOCAL = re.compile(r".*\.(local|localdomain|internal|lan|home|arpa|test|invalid|onion)|(.*\.)?localhost")


def line_of(text: object, field: str, most: int) -> str:
    """One line of visible text, at most `most` characters. UserError for line breaks, bidi marks and their like."""
    if not isinstance(text, str):
        raise UserError(f"{field}: expected text, found {type(text).__name__}")
    text = text.strip(" ")
    bad = next((char for char in text if unicodedata.category(char) in _INVISIBLE), None)
    if bad is not None:
        name = unicodedata.name(bad, f"U+{ord(bad):04X}")
        raise UserError(f"{field}: holds an invisible character ({name}); use one line of plain text")
    if sum(unicodedata.combining(char) > 0 for char in text) > len(text) // 2:
        raise UserError(f"{field}: more combining marks than letters; use one line of plain text")
    if not text:
        raise UserError(f"{field}: is empty; say it in a few words")
    if len(text) > most:
        raise UserError(f"{field}: {len(text):,} characters; at most {most}")
    return text


def is_placeholder(text: str) -> bool:
    """Whether a description is the unedited template, or says nothing."""
    return bool(_PLACEHOLDER.fullmatch(text)) or sum(map(str.isalnum, text)) < 8


def names_of(text: str, field: str) -> list[str]:
    """Contributors separated by commas."""
    names = [line_of(part, field, CONTRIBUTOR) for part in text.split(",")]
    if len(names) > CONTRIBUTORS or len(set(names)) != len(names):
        raise UserError(f"{field}: {len(names)} names; at most {CONTRIBUTORS}, each once")
    return names


def url_of(text: str, field: str) -> str:
    """A link to a log elsewhere: https, a public host name. It is shown, never fetched."""
    found = _URL.fullmatch(text) if len(text) <= URL else None
    host = found[1].lower() if found else ""
    if not found or _LOCAL.fullmatch(host) or host.rpartition(".")[2].isdigit():
        shown = ascii(text)[:80]
        raise UserError(f"{field}: {shown}: expected https:// and a public host, at most {URL} characters")
    return text


def csv_cell(value: object) -> str:
    """A cell that a spreadsheet shows and does not compute, always in quotation marks."""
    text = str(value)
    head = unicodedata.normalize("NFKC", text.lstrip(" \t\r\n\u00a0\ufeff")[:1])
    if head in tuple("=+-@|%") and not re.fullmatch(r"-?\d+(\.\d+)?", text):
        text = "'" + text
    return '"' + text.replace('"', '""').replace("\r", " ").replace("\n", " ") + '"'
