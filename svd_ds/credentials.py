"""Masking of user names, passwords and tokens wherever a text is shown, logged or stored.

A value such as `data.path=https://me:password@host/shards` or `pipe:curl -H 'Authorization: Bearer ...' ...`
is used in full, and `redact` masks it for the console, logs, config.yaml, reports and W&B. The secret is
found by the text around it, so it is also masked in the error of any library that quotes the URL or command.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"
"""Replacement of a secret. A path or URL that contains it is refused: see svd_ds.settings."""
MIN_LENGTH = 6
"""Minimal length of a secret that is also masked on its own: a shorter one could be part of other words."""

_NAME = r"""(?: passw(?:or)?d | passphrase | secret | token | api[-_]?key | access[-_]?key(?:[-_]?id)?
    | (?:account|private|shared)[-_]?key | credentials? | auth(?:orization)? | bearer | signature )"""
"""Pattern of the last part of a secret's name. All patterns use re.VERBOSE."""
_VALUE = r"""(?: "[^"]*" | '[^']*' | [^\s'"]+ )"""
_KIND = r"(?: (?:Bearer|Basic|Token|Digest|Negotiate) \s+ )?"
_HEADER = r"(?! (?:accept|range|host|user-agent|content-type|connection|cache-control)\b ) [\w-]+:"

_PATTERNS = {
    name: re.compile(pattern, re.IGNORECASE | re.VERBOSE)
    for name, pattern in {
        # https://SECRET@host. A raw "/" belongs to a password unless it follows a port.
        "user": r"""(?<=://) (?P<secret> [^\s/?\#'"]+
            | [^\s/?\#'":@]+ : (?! \d{1,5} (?:[/?\#'"\s]|$) ) [^\s'"]+ ) @""",
        # https://host/file?token=SECRET;sig=SECRET
        "query": rf"""(?<=[?&;\#]) (?:amp;)? (?: [\w.~-]* (?: {_NAME} | key | key-pair-id | accessid | sig
            | pass | pwd | jwt | session | sid | code | policy )
            | x-(?:amz|goog)-(?:credential|signature|security-token) ) = (?P<secret> [^&;\#\s'"]+ )""",
        # Parts of a signed URL that are renewed with it: https://host/file?se=2026-12-01&X-Amz-Date=...
        "query of a signature": r"""(?<=[?&;\#]) (?:amp;)? (?: x-(?:amz|goog)-[\w-]+ | expires | st | se | skt
            | ske | skoid | sktid ) = (?P<secret> [^&;\#\s'"]+ )""",
        # --password SECRET, --token=SECRET
        "option": rf"(?<![\w-]) --? (?:[\w-]*[-_])? {_NAME} (?:=|\s+) (?P<secret> {_VALUE} )",
        # curl -u USER:SECRET, smbclient -U USER%SECRET
        "user option": r"""(?<![\w-]) (?: -u | --(?:[a-z]+-)?user(?:name)? ) (?:=|\s*) (?P<secret>
            '[^':%]+ [:%] [^']+' | "[^":%]+ [:%] [^"]+" | [^\s'":%]+ [:%] [^\s'"]+ )""",
        "sshpass": rf"(?<![\w-]) sshpass \s+ (?: -[vef]\S* \s+ )* -p \s* (?P<secret> {_VALUE} )",
        # curl -H 'X-Any: SECRET'
        "header option": rf"""(?<![\w-]) (?: -H | --(?:proxy-)?header ) (?:=|\s*) (?:
            ' {_HEADER} \s* (?P<secret> [^']+ ) ' | " {_HEADER} \s* (?P<quoted> [^"]+ ) "
            | {_HEADER} (?P<bare> [^\s'"]+ ) )""",
        # Authorization: Bearer SECRET, "password": "SECRET"
        "header": rf"""(?<![\w.-]) (?:[\w-]*[-_])? {_NAME} (?: ["'] \s* : \s* | : \s+ )
            (?P<secret> {_KIND} {_VALUE} )""",
        "cookie": r"""(?<![\w.-]) (?:set-)?cookie ["']? \s* : \s* ["']? (?P<secret> [^"'\n]+ )""",
        # AWS_SECRET_ACCESS_KEY=SECRET, SSHPASS=SECRET, password=SECRET
        "assignment": rf"""(?<![\w.?&;\#/-]) (?: \w*? {_NAME} | \w+_key | sshpass | \w+_pass )
            = (?P<secret> {_VALUE} )""",
        "bearer": r"\b Bearer \s+ (?P<secret> [\w.~+/=-]{6,} )",
        # Tokens of well-known services.
        "token": r"""\b (?P<secret> hf_[a-z0-9]{20,} | gh[pousr]_\w{20,} | github_pat_\w{20,}
            | glpat-[\w-]{15,} | A(?:KIA|SIA)[A-Z0-9]{16} | AIza[\w-]{30,} | xox[a-z]-[\w-]{10,}
            | sk-[\w-]{20,} | eyJ[\w-]{10,}\.[\w-]+(?:\.[\w-]+)? )""",
    }.items()
}

_known: set[str] = set()


def redact(text: str) -> str:
    """Mask the credentials in a text."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern in _PATTERNS.values():
        text = pattern.sub(_masked, text)
    return text


def redact_tree(tree: Any) -> Any:
    """Mask the credentials in each text of a tree of dicts and lists, keys included."""
    if isinstance(tree, dict):
        return {redact_tree(key): redact_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(redact_tree, tree))
    return redact(tree) if isinstance(tree, str) else tree


def remember_tree(tree: Any) -> None:
    """Remember the secrets in a tree of texts. From now on `redact` also masks them without the text around
    them, as in an error that quotes only the password."""
    if isinstance(tree, dict):
        tree = [*tree.keys(), *tree.values()]
    if isinstance(tree, (list, tuple)):
        for part in tree:
            remember_tree(part)
    elif isinstance(tree, str):
        for name, pattern in _PATTERNS.items():
            # The date of a signature may be in any text.
            for match in pattern.finditer(tree) if name != "query of a signature" else ():
                secret = _core(match, is_pair=name in ("user", "user option"))
                forms = (secret, quote(secret, ""), unquote(secret))
                _known.update(form for form in forms if len(form) >= MIN_LENGTH)


def _core(match: re.Match[str], is_pair: bool) -> str:
    """Return the secret itself, without a user name or a scheme such as Bearer."""
    start, end = _span(match)
    secret = match.string[start:end].strip("'\"")
    if is_pair:
        # Only the password of USER:PASSWORD: the user name may be part of other texts.
        secret = re.split("[:%]", secret, maxsplit=1)[-1]
    return re.sub(_KIND, "", secret, count=1, flags=re.IGNORECASE | re.VERBOSE)


def _masked(match: re.Match[str]) -> str:
    start, end = (index - match.start() for index in _span(match))
    return match[0][:start] + MASK + match[0][end:]


def _span(match: re.Match[str]) -> tuple[int, int]:
    """Return start and end of the secret."""
    return next(match.span(name) for name in match.re.groupindex if match[name] is not None)
