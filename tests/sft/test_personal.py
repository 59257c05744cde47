from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.messages import Conversation, Message, Reason, RowError, ToolCall
from sft.personal import Kind, redact, screen_personal
from tests.sft.rows_of_text import conversation

FOUND: list[tuple[Kind, str]] = [
    ("email", "jane.doe+news@mail.example.com"),
    ("email", "josé@büro.de"),
    ("email", "foo_bar@x-y.org"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "DE89370400440532013000"),
    ("iban", "GB82 WEST 1234 5698 7654 32"),
    ("iban", "NL91 ABNA 0417 1643 00"),
    ("iban", "MT84 MALT 0110 0001 2345 MTLC AST0 01S"),
    ("iban", "FR14 2004 1010 0505 0001 3M02 606"),
    ("iban", "NO93 8601 1117 947"),
    ("card", "4111 1111 1111 1111"),
    ("card", "4111-1111-1111-1111"),
    ("card", "4111111111111111"),
    ("card", "3782 822463 10005"),
    ("card", "5555 5555 5555 4444"),
    ("card", "2223003122003222"),
    ("card", "30569309025904"),
    ("phone", "+49 30 1234567"),
    ("phone", "+49 (0)30 1234567"),
    ("phone", "+1 (555) 123-4567"),
    ("phone", "+442079460958"),
    ("phone", "(555) 123-4567"),
    ("phone", "555-123-4567"),
    ("phone", "1-800-555-0199"),
    ("phone", "020 7946 0958"),
    ("phone", "01 23 45 67 89"),
    ("phone", "030/1234567"),
    ("phone", "07700 900123"),
    ("ip", "192.168.10.5"),
    ("ip", "8.8.4.40"),
    ("ip", "2001:db8::1"),
    ("ip", "2a00:1450:4001:81b::200e"),
    ("ip", "2001:0db8:85a3:0000:0000:8a2e:0370:7334"),
]

CLEAN = [
    "In 1998, 2001 and 2023 people ran 100,000 km.",
    "1.2.3.4",
    "v10.2.3.44 is out",
    "12.3.4.5.6",
    "255.255.255.0",
    "127.0.0.1",
    "300.1.2.30",
    "a@b.sum()",
    "a @ b",
    "git@github.com:org/repo.git",
    "icon@2x.png",
    "std::vector<int>",
    "2023-10-11 12:13:14",
    "01.12.2023",
    "01/12/2023 10:00",
    "3.14159265358979",
    "1234567890123456",
    "4111 1111 1111 1112",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
    "+1 2 3 4 5 6 7 8 9",
    "+12345678",
    "2+22222222",
    "978-3-16-148410-0",
    "1,234,567.89",
    "DE89 3704 0044 0532 0130 01",
    "AB12 CDEF 3456 7890",
    "05 10 15 20 25 30",
    "12:34:56:78:90",
    "550e8400-e29b-41d4-a716-446655440000",
    "2147483647",
    "https://x.org/2023/01/02/123456789",
]


@pytest.mark.parametrize(("kind", "value"), FOUND)
@pytest.mark.parametrize("frame", ["{}", "It is {}.", "({}), or", "one:\n{}\ntwo"])
def test_each_kind_is_found_and_replaced(kind: Kind, value: str, frame: str) -> None:
    assert redact(frame.format(value)) == (frame.format(f"[{kind.upper()}]"), (kind,))


@pytest.mark.parametrize("text", CLEAN)
def test_what_only_resembles_is_left(text: str) -> None:
    assert redact(text) == (text, ())
    assert redact(f"so {text} it is") == (f"so {text} it is", ())


def test_an_account_number_ends_where_its_country_says() -> None:
    assert redact("BE68 5390 0754 7034 DATE") == ("[IBAN] DATE", ("iban",))


def test_several_kinds_in_one_text() -> None:
    text = "a@b.co, +49 30 1234567, a@b.co, 4111 1111 1111 1111"
    assert redact(text) == ("[EMAIL], [PHONE], [EMAIL], [CARD]", ("email", "card", "phone"))


def test_all_texts_of_a_conversation_are_redacted() -> None:
    call = ToolCall("send", {"to": ["a@b.co", {"cc": "c@d.eu"}], "count": 3}, id="x1")
    row = Conversation(
        (
            Message("system", "Mail from 10.1.2.3"),
            Message("user", "nothing"),
            Message("assistant", "", reasoning="to a@b.co", tool_calls=(call,), trained=True),
        ),
        task="t",
    )
    assert screen_personal(row, "flag") == (row, ("ip", "email"))
    assert screen_personal(row, "keep") == (row, ())
    sent = ToolCall("send", {"to": ["[EMAIL]", {"cc": "[EMAIL]"}], "count": 3}, id="x1")
    assert screen_personal(row, "redact") == (
        Conversation(
            (
                Message("system", "Mail from [IP]"),
                Message("user", "nothing"),
                Message("assistant", "", reasoning="to [EMAIL]", tool_calls=(sent,), trained=True),
            ),
            task="t",
        ),
        ("ip", "email"),
    )


def test_a_clean_conversation_stays_the_same_object() -> None:
    row = conversation("Say hi", "hi")
    assert screen_personal(row, "redact")[0] is row


def test_a_dropped_row_is_not_quoted() -> None:
    row = conversation("Say hi", "to a@b.co or +49 30 1234567")
    with pytest.raises(RowError) as caught:
        screen_personal(row, "drop")
    assert caught.value.reason == Reason.PERSONAL_DATA
    assert caught.value.field == "messages[1]"
    assert caught.value.message == "the turn holds an e-mail address and a telephone number"


@given(st.integers(0, 10**18 - 1))
def test_any_account_number_with_its_check_digits_is_found(account: int) -> None:
    bank = f"{account:018d}"
    check = 98 - int(bank + "131400") % 97  # D is 13, E is 14
    assert redact(f"DE{check:02d}{bank}") == ("[IBAN]", ("iban",))
    wrong = check - 1 if check > 2 else check + 1
    assert "iban" not in redact(f"DE{wrong:02d}{bank}")[1]


@given(st.text("0123456789.:+-/ ()@aAbcDE", max_size=60))
def test_text_without_finds_is_untouched(text: str) -> None:
    redacted, kinds = redact(text)
    assert (redacted == text) == (not kinds)


@pytest.mark.parametrize("piece", ["a", "a.", "a@", "@", "1-", "1 ", "1.", "1:", "2001:", "0", "(", "ABCD", "+1 "])
def test_time_grows_with_the_length_alone(piece: str) -> None:
    # A pattern that goes back over what it read would take hours here, and the test's time limit end it.
    redact("2001:1111111 DE12" + piece * 200_000 + "@")
