"""User names, passwords and tokens in texts: they are masked wherever a text is shown, logged or stored.

A value such as `data.path=https://me:password@host/shards` or `pipe:curl -H 'Authorization: Bearer ...' ...`
is used in full, and `redact` masks it for the console, logs, config.yaml, reports and W&B. The secret is
found by what stands around it, so it is masked in an error of any library that quotes the URL or command.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"
"""What stands in the place of a secret. A path or URL that holds it is not used: see svd_ds.settings."""
MIN_LENGTH = 6
"""Characters of a secret that is looked for by itself too: a shorter one would be found in other words."""

_NAME = r"""(?: passw(?:or)?d | passphrase | secret | token | api[-_]?key | access[-_]?key(?:[-_]?id)?
    | (?:account|private|shared)[-_]?key | credentials? | auth(?:orization)? | bearer | signature )"""
"""What the name of a secret ends with. This and the other patterns are in Python's verbose form."""
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
        # What changes with the signature: https://host/file?se=2026-12-01&X-Amz-Date=...
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
        # What tokens of well-known services look like.
        "token": r"""\b (?P<secret> hf_[a-z0-9]{20,} | gh[pousr]_\w{20,} | github_pat_\w{20,}
            | glpat-[\w-]{15,} | A(?:KIA|SIA)[A-Z0-9]{16} | AIza[\w-]{30,} | xox[a-z]-[\w-]{10,}
            | sk-[\w-]{20,} | eyJ[\w-]{10,}\.[\w-]+(?:\.[\w-]+)? )""",
    }.items()
}

_known: set[str] = set()


def redact(text: str) -> str:
    """Mask the credentials in a text; the same text where there are none."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern in _PATTERNS.values():
        text = pattern.sub(_masked, text)
    return text


def redact_tree(tree: Any) -> Any:
    """The same values with the credentials masked in each text, keys of dicts included."""
    if isinstance(tree, dict):
        return {redact_tree(key): redact_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(redact_tree, tree))
    return redact(tree) if isinstance(tree, str) else tree


def remember_tree(tree: Any) -> None:
    """Mask the secrets in these texts from now on also where they stand alone, as in an error that quotes no
    more than the password."""
    if isinstance(tree, dict):
        tree = [*tree.keys(), *tree.values()]
    if isinstance(tree, (list, tuple)):
        for part in tree:
            remember_tree(part)
    elif isinstance(tree, str):
        for name, pattern in _PATTERNS.items():
            # A date may stand in any text.
            for match in pattern.finditer(tree) if name != "query of a signature" else ():
                secret = _core(match, is_pair=name in ("user", "user option"))
                forms = (secret, quote(secret, ""), unquote(secret))
                _known.update(form for form in forms if len(form) >= MIN_LENGTH)


def _core(match: re.Match[str], is_pair: bool) -> str:
    """The secret itself, without what says of which kind it is."""
    start, end = _span(match)
    secret = match.string[start:end].strip("'\"")
    if is_pair:
        # Of USER:PASSWORD the password: the user's name is part of other texts.
        secret = re.split("[:%]", secret, maxsplit=1)[-1]
    return re.sub(_KIND, "", secret, count=1, flags=re.IGNORECASE | re.VERBOSE)


def _masked(match: re.Match[str]) -> str:
    start, end = (place - match.start() for place in _span(match))
    return match[0][:start] + MASK + match[0][end:]


def _span(match: re.Match[str]) -> tuple[int, int]:
    """Where the secret stands."""
    return next(match.span(name) for name in match.re.groupindex if match[name] is not None)
