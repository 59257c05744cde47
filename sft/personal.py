"""Personal data in rows, by patterns and check digits alone: what is found is likely meant, what is missed is much.

Names and postal addresses are not looked for: that takes a model of language.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from sft.messages import Conversation, Message, Reason, RowError

Kind = Literal["email", "iban", "card", "phone", "ip"]

PersonalAction = Literal["keep", "flag", "redact", "drop"]

_NAMES: dict[Kind, str] = {
    "email": "an e-mail address",
    "iban": "a bank account number",
    "card": "a payment card number",
    "phone": "a telephone number",
    "ip": "an IP address",
}

# Nothing is found in a text that has no @ and not these: first what is cheap to rule out, a digit and what may go on as
# a number, then the start of an address or seven digits close together.
_LIKELY = re.compile(r"[0-9](?:[0-9 \u00a0()./\-]{6}|[0-9a-fA-F]{3}:[0-9a-fA-F:])")
_NUMBERS = re.compile(
    r"[0-9](?:[0-9]{0,2}\.[0-9]{1,3}\.[0-9]|[0-9a-fA-F]{3}:[0-9a-fA-F:]|(?:[ \u00a0()./\-]{0,3}[0-9]){6})"
)

# Numpy code (`a@b.sum()`), remotes (`git@host.org:path`) and images (`icon@2x.png`) look like addresses.
_EMAIL = re.compile(
    r"(?<![\w.+%\-])[\w.+%\-]{1,64}@(?:[\w\-]{1,63}\.){1,8}(?!(?:png|jpe?g|gif|svg|webp)\b)[^\W\d_]{2,24}"
    r"(?![\w(\[]|:[\w~/])"
)
_IBAN = re.compile(
    r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?:[ \u00a0]?[A-Z0-9]{4}){2,7}(?:[ \u00a0]?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"
)
_CARD = re.compile(
    r"(?<![\w.+\-])(?:[2-6][0-9]{3}([ \-]?)[0-9]{4}\1[0-9]{4}\1[0-9]{1,7}|3[0-9]{3}([ \-]?)[0-9]{6}\2[0-9]{4,5})"
    r"(?![\w\-]|\.[0-9])"
)
_PHONE = re.compile(
    r"(?<![\w+.\-/])(?<![0-9][ \u00a0])(?:"
    # +49 (0)30 1234567
    r"\+[1-9](?:[ \u00a0.\-/]?(?:\([0-9]{1,4}\)|[0-9])){6,14}"
    # (555) 123-4567, 555-123-4567, 555.123.4567
    r"|(?:\+?1[ .\-])?(?:\([1-9][0-9]{2}\) ?[0-9]{3}[ .\-][0-9]{4}|[1-9][0-9]{2}([.\-])[0-9]{3}\1[0-9]{4})"
    # 020 7946 0958, 01 23 45 67 89, 030/1234567, 07700 900123
    r"|(?:\(0[1-9][0-9]{0,4}\)|0[1-9][0-9]{0,4})(?:([ .\-])[0-9]{2,4}(?:\2[0-9]{2,4}){1,3}|[ /][0-9]{5,8})"
    r")(?!\w|[ .\-/][0-9])"
)
_IPV4 = re.compile(r"(?<![\w.\-])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w\-]|\.[0-9])")
# Addresses that are routed begin with 2 or 3.
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])")

# Country and length of its account numbers (ISO 13616).
_IBANS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
    "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
    "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
    "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
)
_IBAN_LENGTHS = {code[:2]: int(code[2:]) for code in _IBANS.split()}
# The first digits and lengths that card networks give out.
_CARD_NUMBERS = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}"
    r"|3[47][0-9]{13}|3(?:0[0-5]|[68][0-9])[0-9]{11}|35[0-9]{14}|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}"
    r"|62[0-9]{14,17}"
)


def screen_personal(conversation: Conversation, action: PersonalAction) -> tuple[Conversation, tuple[Kind, ...]]:
    """Looks for personal data in all messages, their reasoning and the text in tool arguments.

    Args:
        conversation: as read.
        action: `keep` looks for nothing; `redact` puts a mark such as [EMAIL] in the place of each find.

    Returns:
        The conversation, itself or redacted, and the kinds that were found.

    Raises:
        RowError: something was found, and the action is `drop`. The message names the place and the kinds alone.
    """
    if action == "keep":
        return conversation, ()
    found: dict[Kind, None] = {}
    messages = []
    for i, message in enumerate(conversation.messages):
        redacted, kinds = _redact_message(message)
        if kinds and action == "drop":
            what = " and ".join(_NAMES[kind] for kind in kinds)
            raise RowError(Reason.PERSONAL_DATA, f"messages[{i}]", f"the turn holds {what}")
        found |= kinds
        messages.append(redacted)
    if found and action == "redact":
        conversation = dataclasses.replace(conversation, messages=tuple(messages))
    return conversation, tuple(found)


def redact(text: str) -> tuple[str, tuple[Kind, ...]]:
    """Puts marks in the place of personal data: [EMAIL], [IBAN], [CARD], [PHONE], [IP].

    Returns:
        The text with marks, and the kinds that were found.
    """
    found: dict[Kind, None] = {}
    return _redact(text, found), tuple(found)


def _redact(text: str, found: dict[Kind, None]) -> str:
    likely = _LIKELY.search(text)
    numbers = likely is not None and _NUMBERS.search(text, likely.start()) is not None
    if not numbers and "@" not in text:
        return text
    for kind, pattern, keep in _FINDERS:
        if numbers if kind != "email" else "@" in text:

            def mark(match: re.Match[str], kind: Kind = kind, keep: Callable[[str], str | None] = keep) -> str:
                rest = keep(match[0])
                if rest is None:
                    return match[0]
                found[kind] = None
                return f"[{kind.upper()}]{rest}"

            text = pattern.sub(mark, text)
    return text


def _redact_message(message: Message) -> tuple[Message, dict[Kind, None]]:
    found: dict[Kind, None] = {}
    content = _redact(message.content, found)
    reasoning = None if message.reasoning is None else _redact(message.reasoning, found)
    calls = message.tool_calls
    if calls:
        calls = tuple(dataclasses.replace(call, arguments=_redact_value(call.arguments, found)) for call in calls)
    if found:
        message = dataclasses.replace(message, content=content, reasoning=reasoning, tool_calls=calls)
    return message, found


def _redact_value(value: Any, found: dict[Kind, None]) -> Any:
    if isinstance(value, str):
        return _redact(value, found)
    if isinstance(value, Mapping):
        return {key: _redact_value(inner, found) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_value(inner, found) for inner in value]
    return value


# Each looks at a match and returns what of its end is none of it, or None where all is something else.


def _any(_: str) -> str:
    return ""


def _iban(match: str) -> str | None:
    length = _IBAN_LENGTHS.get(match[:2], len(match) + 1)
    places = [i for i, letter in enumerate(match) if letter.isalnum()]
    if len(places) < length:
        return None
    end = places[length - 1] + 1
    number = "".join(match[i] for i in places[:length])
    value = int("".join(str(int(letter, 36)) for letter in number[4:] + number[:4]))
    # What follows in capitals may look like one more group, but a number does not end within a group.
    return match[end:] if value % 97 == 1 and not match[end : end + 1].isalnum() else None


def _card(match: str) -> str | None:
    digits = [int(letter) for letter in match if letter.isdigit()]
    total = sum(digits[-1::-2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    known = _CARD_NUMBERS.fullmatch("".join(map(str, digits)))
    return "" if known and total % 10 == 0 else None


def _phone(match: str) -> str | None:
    digits = sum(map(str.isdigit, match))
    groups = len(re.findall("[0-9]+", match))
    if match.startswith("+"):
        # Without groups it may be a signed number; with many it is a list.
        return "" if digits <= 15 and (digits >= 10 if groups == 1 else digits >= 8 and groups <= 6) else None
    return "" if 9 <= digits <= 12 else None


def _ipv4(match: str) -> str | None:
    parts = match.split(".")
    octets = [int(part) for part in parts]
    written = all(octet <= 255 and str(octet) == part for octet, part in zip(octets, parts, strict=True))
    # 1.2.3.4 is a section or a version; 0, 127 and 224 up are no one's: unset, this machine, groups and masks.
    return "" if written and max(octets) >= 10 and 0 < octets[0] < 224 and octets[0] != 127 else None


def _ipv6(match: str) -> str | None:
    try:
        ipaddress.IPv6Address(match)
    except ValueError:
        return None
    return ""


_FINDERS: tuple[tuple[Kind, re.Pattern[str], Callable[[str], str | None]], ...] = (
    ("email", _EMAIL, _any),
    ("iban", _IBAN, _iban),
    ("card", _CARD, _card),
    ("phone", _PHONE, _phone),
    ("ip", _IPV4, _ipv4),
    ("ip", _IPV6, _ipv6),
)
