"""Detection and masking of secrets, used wherever a config, a log, an error or a patch is written or shown.

A secret is recognised by its key, its position (the address of an alert), its form (a password in a URL, a signed query, a
private key), or because it came from the environment. Its value is masked wherever it occurs, in every escaped form.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import markupsafe

from engine.config import nested

MASK = "***"
SHORTEST = 4  # characters; masking shorter values would mask parts of ordinary words
FREE_STANDING = 8  # a shorter value is masked only where no letter or digit is beside it
_NAME = r"password|passwd|secret|token|api_?key|access_?key|private_?key|credential"
NAMED = re.compile(f"({_NAME})", re.IGNORECASE)
_ALERT_TO = re.compile(r"^monitor\.alerts\..+\.to$")  # the address of a webhook grants access
_ALERT_WORD = re.compile(r"^[+~]*monitor\.alerts\b.*://", re.DOTALL)
_VARIABLE = re.compile(r"\$\{oc\.env:\s*['\"]?(\w+)")
_REFERENCE = re.compile(r"\$\{oc\.env:[^{}]*\}")
_SECRET_VARIABLE = re.compile(rf"({_NAME}|webhook|_key$|_dsn$)", re.IGNORECASE)
_FORMS = (
    re.compile(r"(://[^/\s:@\"']*:)[^/\s@\"']+(?=@)"),  # scheme://user:PASSWORD@host
    re.compile(
        r"([?&;](?:x-(?:amz|goog)-(?:signature|security-token|credential)|signature|sig|token|access_token|auth|api_?key|key|"
        r"password|secret)=)[^&\s\"'\\#<>*]+",
        re.IGNORECASE,
    ),
    re.compile(r"(authorization\\?[\"']?\s*:\s*\\?[\"']?(?:\w+ )?)[^\s\"'\\*]{8,}", re.IGNORECASE),
    re.compile(r"(\bbearer )(?=\S*\d)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"()\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_\w{30,}|github_pat_\w{30,}|xox[abeprs]-[\w-]{10,}|sk-[\w-]{20,})\b"),
    re.compile(r"()\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"),  # a JSON web token
    re.compile(
        r"(\bhttps://(?:hooks\.slack\.com/|discord\.com/api/webhooks/|[\w.-]+\.webhook\.office\.com/))[^\s\"'<>*]+"
    ),
)
_KEY_BLOCK = re.compile(r"-----(BEGIN|END) [A-Z0-9 ]*PRIVATE KEY-----")
# In code and config files: a text in quotes, or letters and digits up to the end of the line, assigned to a secret's name.
_ASSIGNED = re.compile(
    rf"((?:{_NAME})s?\d*[\"']?\s*[:=]\s*)(?:(?P<kind>[rbf]?)(?P<quote>[\"'])[^\s\"'{{}}$<>*]{{6,}}(?P=quote)"
    r"|(?=\S*\d)(?=\S*[a-z])[^\s\"'(){}$<>*\[\],]{8,}\s*$)",
    re.IGNORECASE,
)
# Names of files and folders that usually contain secrets; each part of a path is compared in lower case.
FILES = (
    ".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".htpasswd", ".npmrc", ".pypirc", ".git-credentials",
    ".my.cnf", ".s3cfg", ".boto", "*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.ovpn",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "credentials", "*credentials.json", "credentials.*", "secrets", "secrets.*",
    "*service_account*.json", "*service-account*.json", "*.tfstate", "*.tfvars", "kubeconfig",
    ".aws", ".azure", ".docker", ".gcloud", ".gnupg", ".kube", ".ssh", ".terraform",
)  # fmt: skip
# Code and examples have such names too.
HARMLESS = ("*.example", "*.sample", "*.template", "*.py", "*.pyi", "*.pub")


def holds_file(path: PurePath) -> bool:
    """Whether a file usually contains secrets, by its name or that of a folder above it."""
    *above, last = (part.lower() for part in path.parts)
    harmless = any(fnmatch.fnmatchcase(last, pattern) for pattern in HARMLESS)
    parts = above if harmless else [*above, last]
    return any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in FILES)


# ---------------------------------------------------------------------------------------------------------- a config


def of_config(
    written: Mapping[str, Any], values: Mapping[str, Any], keys: Collection[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Secret values, longest first, and what is saved instead of each, by path: the reference to it, or `***`.

    `written` is the config as written and `values` as resolved, both by dotted path; `keys` are the last parts of the
    engine's keys, since a column, a rule or an output may be named `token`.
    """
    hidden: set[str] = set()
    references: dict[str, str] = {}
    around = _of_environment()
    for path, text in written.items():
        value = str(values.get(path, ""))
        if not isinstance(text, str) or not text:
            continue
        last = path.rsplit(".", 1)[-1]
        named = last in keys and bool(NAMED.search(last))
        named |= bool(_ALERT_TO.match(path)) and "://" in value
        if named or ("oc.env" in text and not _is_place(path, text, value)):
            hidden |= {value, *_beyond_host(value)}
            references[path] = text if "oc.env" in text else MASK
            # Each part alone too, because the reply of a command or server may quote only that part.
            hidden |= {
                os.environ[name] for name in _VARIABLE.findall(text) if name in os.environ and not _is_path(name)
            }
        elif "oc.env" not in text and (found := {one for one in around if one in value}):
            hidden |= found  # expanded by the shell
            references[path] = redact(text, found)
    for path, text in written.items():  # values composed from a secret
        if (
            isinstance(text, str)
            and "${" in text
            and any(len(one) >= SHORTEST and one in str(values.get(path)) for one in hidden)
        ):
            references[path] = text
    return tuple(sorted((value for value in hidden if value), key=len, reverse=True)), references


def of_texts(written: Iterable[Any]) -> tuple[str, ...]:
    """Values of the variables that texts refer to, before resolution, because an error message may quote one."""
    names = {name for text in written if isinstance(text, str) for name in _VARIABLE.findall(text)}
    return tuple(os.environ[name] for name in sorted(names) if name in os.environ and not _is_path(name))


def _of_environment() -> set[str]:
    return {
        value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= FREE_STANDING
    } - {value for name, value in os.environ.items() if _is_path(name)}


def _is_path(variable: str) -> bool:
    """Whether a variable is empty or an existing path, and its name is not that of a secret."""
    value = os.environ.get(variable, "")
    return not value or (os.path.exists(value) and not _SECRET_VARIABLE.search(variable))


def _is_place(path: str, text: str, value: str) -> bool:
    if NAMED.search(text) or "://" in value:
        return False
    return path.startswith("paths.") or path.endswith("path") or os.path.exists(value)


def _beyond_host(value: str) -> set[str]:
    """The part of an address after the host, which servers and libraries quote alone."""
    address = value.partition("://")[2]
    beyond = address[address.find("/") :] if "/" in address else ""
    return {beyond} if len(beyond) >= 2 * FREE_STANDING else set()


# --------------------------------------------------------------------------------------------------------- any text


def redact(text: str, hidden: Iterable[str] = ()) -> str:
    """The text with secret values, and parts that look like secrets, masked."""
    for value in hidden:
        if len(value) < SHORTEST:
            continue
        forms = {
            value,
            json.dumps(value, ensure_ascii=False)[1:-1],
            json.dumps(value)[1:-1],
            repr(value)[1:-1],
            str(markupsafe.escape(value)),
            urllib.parse.quote(value, safe=""),
            urllib.parse.quote(value),
        }
        for form in sorted(forms, key=len, reverse=True):
            if len(value) >= FREE_STANDING:
                text = text.replace(form, MASK)
            elif form in text:
                text = re.sub(rf"(?<![^\W_]){re.escape(form)}(?![^\W_])", MASK, text)
    for pattern in _FORMS:
        text = pattern.sub(rf"\1{MASK}", text)
    return text


def masked(value: Any, mask: Callable[[str], str]) -> Any:
    """A JSON value with its texts and keys masked; numbers stay numbers."""
    return nested.mapped(value, lambda _, item: mask(item) if isinstance(item, str) else item, key=mask)


def masked_word(word: str) -> str:
    """An override with its secrets masked."""
    name, equals, _ = word.partition("=")
    found = NAMED.search(name.rsplit(".", 1)[-1]) or _ALERT_WORD.match(word)
    return f"{name}={MASK}" if equals and found else redact(word, _of_environment())


def is_secret_word(word: str) -> bool:
    """Whether an override contains a literal secret, not only references to the environment."""
    if not word.partition("=")[2]:
        return False
    rest = _REFERENCE.sub("", word)
    return redact(rest, _of_environment()) != rest if rest != word else masked_word(word) != word


@contextlib.contextmanager
def masked_errors(hidden: Iterable[str]) -> Iterator[None]:
    """Mask secrets in the messages of exceptions raised in the block."""
    try:
        yield
    except BaseException as error:
        hide_in(error, tuple(hidden))
        raise


def hide_in(error: BaseException, hidden: Collection[str]) -> None:
    """Mask secrets in the texts of an error, its causes and its contexts, which can form a cycle."""
    waiting: list[BaseException | None] = [error]
    done: list[BaseException] = []
    while waiting:
        found = waiting.pop()
        if found is None or any(found is other for other in done):
            continue
        done.append(found)
        found.args = tuple(redact(item, hidden) if isinstance(item, str) else item for item in found.args)
        if isinstance(found, OSError):  # its message is composed of these
            found.strerror, found.filename = (
                redact(item, hidden) if isinstance(item, str) else item for item in (found.strerror, found.filename)
            )
        waiting += [found.__cause__, found.__context__]


# ---------------------------------------------------------------------------------------------------------- a patch


def masked_patch(patch: str, hidden: Iterable[str] = ()) -> tuple[str, list[str]]:
    """(`git diff` without secrets, list of omissions): files that usually contain secrets are left out; in lines that look
    like secrets the value is masked.
    """
    kept, omitted = [], []
    values = {*hidden, *_of_environment()}
    for part in re.split(r"(?m)^(?=diff --git )", patch):
        name = _name_in(part)
        if name and any(holds_file(PurePath(side)) for side in name):
            omitted.append(f"{name[-1]} (left out)")
            continue
        if "\nGIT binary patch" in part:  # bytes, compressed
            kept.append(part)
            continue
        lines = part.split("\n")
        shown, block = [], False
        for line in lines:
            edge = _KEY_BLOCK.search(line)
            block = bool(edge and edge[1] == "BEGIN") or (block and not edge)
            inside = block and not edge
            text = f"{line[:1]}{MASK}" if inside else _ASSIGNED.sub(_in_place, redact(line, values))
            shown.append(text)
        changed = sum(now != then for now, then in zip(shown, lines, strict=True))
        if changed:
            omitted.append(f"{name[-1] if name else 'the patch'} ({changed} lines masked)")
        kept.append("\n".join(shown))
    return "".join(kept), omitted


def _in_place(found: re.Match[str]) -> str:
    """The assignment with its value masked and its syntax kept."""
    quote = found["quote"] or ""
    return f"{found[1]}{found['kind'] or ''}{quote}{MASK}{quote}"


def _name_in(part: str) -> tuple[str, ...]:
    """The file's names before and after, from one part of a patch."""
    head = part.split("\n@@", 1)[0].split("\nGIT binary patch", 1)[0]
    found = re.findall(r"(?m)^(?:---|\+\+\+) \"?[ab]/(.+?)\"?\t?$", head)
    found += re.findall(r"(?m)^rename (?:from|to) \"?(.+?)\"?$", head)
    if not found and (match := re.match(r"diff --git \"?a/(.+?)\"? \"?b/(.+?)\"?\n", part)):
        found = [match[1], match[2]]
    return tuple(found)
