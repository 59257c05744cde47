from __future__ import annotations

import json
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from evals.answer import Answer, split
from evals.checkers import AnyChecker
from evals.errors import CheckError
from evals.language import language
from evals.text_checkers import normalised, numbers
from evals.words import bullets, sentences, words

WORDS = st.text("aAB7 the,.{}[]\"'\n-\u00e9\ufb01\u0130\u00df\u4f60", max_size=40)
CHECKER: TypeAdapter[AnyChecker] = TypeAdapter(AnyChecker)


def score(text: str, reference: Any = None, /, **settings: Any) -> float:
    checker = CHECKER.validate_python(settings)
    assert checker.fault(reference) is None
    found = checker.check(split(text), reference)
    assert (found.value == 1) == (found.reason == "")
    return found.value


def fault(reference: Any = None, **settings: Any) -> str | None:
    return CHECKER.validate_python(settings).fault(reference)


@pytest.mark.parametrize(
    ("text", "reasoning", "parts"),
    [
        ("Paris.", "", Answer("Paris.", "", "Paris.", None)),
        ("<think>Hm.</think>\n\nParis", "", Answer("<think>Hm.</think>\n\nParis", "Hm.", "Paris", None)),
        ("Hm.</think>Paris", "", Answer("Hm.</think>Paris", "Hm.", "Paris", None)),
        ("Paris", "Hm.", Answer("Hm.\nParis", "Hm.", "Paris", None)),
        ("<think>Hm. The answer is 3", "", Answer("<think>Hm. The answer is 3", "Hm. The answer is 3", "", None)),
        ("2 + 2 = 4. The answer is 4.", "", Answer("2 + 2 = 4. The answer is 4.", "2 + 2 = 4. The",
                                                   "2 + 2 = 4. The answer is 4.", "4")),
        ("so\n#### 1,200", "", Answer("so\n#### 1,200", "so", "so\n#### 1,200", "1,200")),
        (r"It is \boxed{7}.", "", Answer(r"It is \boxed{7}.", "It is", r"It is \boxed{7}.", "7")),
        ("**Answer:** B", "", Answer("**Answer:** B", "**", "**Answer:** B", "B")),
    ],
)  # fmt: skip
def test_an_answer_has_its_parts(text: str, reasoning: str, parts: Answer) -> None:
    assert split(text, reasoning) == parts


def test_the_last_mark_counts_and_marks_in_the_thinking_do_not() -> None:
    assert split("The answer is 1. No: the answer is 2.").final == "2"
    assert split("<think>The answer is 1.</think>I cannot say.").final is None


def test_strict_and_flexible_readings_of_a_chain_of_thought_differ() -> None:
    text = "Three boxes of four make 12"
    assert score(text, 12, kind="number", of="final") == 0
    assert score(text, 12, kind="number", of="whole") == 1
    assert score(text + ". The answer is 12.", 12, kind="number", of="final") == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("none", []),
        ("1,234.50 and -3", ["1234.50", "-3"]),
        ("$5, 7%, .5.", ["5", "7", ".5"]),
        ("3-4 = \u22121", ["3", "4", "-1"]),
        ("2,34", ["2", "34"]),
        ("v2 and x3", []),
    ],
)
def test_numbers(text: str, found: list[str]) -> None:
    assert [str(Decimal(one)) for one in found] == list(map(str, numbers(text)))


@given(st.integers(-(10**9), 10**9))
def test_a_number_is_read_with_and_without_commas(number: int) -> None:
    assert numbers(f"It is {number:,}.") == numbers(f"It is {number}.") == [Decimal(number)]


def test_exact_and_normalised() -> None:
    assert score(" Paris\n", "Paris", kind="exact") == 1
    assert score("paris", "Paris", kind="exact") == 0
    assert score("The  PARIS!", "paris", kind="exact", normalise=True) == 1
    assert score("Paris", ["London", "Paris"], kind="exact") == 1
    assert score("Paris", "London", kind="exact", reference="Paris") == 1
    assert score("In paris, yes", "Paris", kind="contains") == 1
    assert score("parish", "Paris", kind="contains") == 0


@given(WORDS)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@settings(max_examples=50)
@given(WORDS, st.sampled_from(["exact", "contains", "number", "choice", "json_field"]))
def test_comparing_never_fails_on_odd_text(text: str, kind: str) -> None:
    reference = {"number": 7, "choice": "B"}.get(kind, "yes")
    extra = {"field": "a"} if kind == "json_field" else {}
    assert 0 <= score(text, reference, kind=kind, **extra) <= 1


def test_numbers_compare() -> None:
    assert score("5 apples and 7 pears", "7", kind="number") == 1
    assert score("5 apples and 7 pears", 5, kind="number", which="first") == 1
    assert score("5 apples and 7 pears", 7, kind="number", which="only") == 0
    assert score("3.14", 3.1416, kind="number", tolerance=0.01) == 1
    assert score("none", 3, kind="number") == 0


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("B", 1, 1),
        ("(B)", 1, 1),
        ("B) Paris", 1, 1),
        ("B. Paris", 1, 1),
        ("It is B", 0, 1),
        ("A dog is (B), not C", 0, 1),
        ("Bread", 0, 0),
        ("C", 0, 0),
        ("", 0, 0),
    ],
)
def test_multiple_choice(text: str, strict: float, flexible: float) -> None:
    assert score(text, "B", kind="choice") == strict
    assert score(text, "B", kind="choice", reading="flexible") == flexible


def test_patterns() -> None:
    assert score("on 2026-01-31.", kind="regex", pattern=r"\d{4}-\d\d-\d\d") == 1
    assert score("on 2026-01-31.", kind="regex", pattern=r"\d{4}-\d\d-\d\d", match="full") == 0
    assert score("Sorry, no", kind="regex", pattern="sorry", ignore_case=True, none=True) == 0
    with pytest.raises(ValidationError, match="not a regular expression"):
        fault(kind="regex", pattern="(")


def test_a_pattern_that_backtracks_for_ever_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evals.text_checkers.PATTERN_S", 0.05)
    begun = time.monotonic()
    with pytest.raises(CheckError, match="took longer"):
        score("a" * 60 + "!", kind="regex", pattern=r"(?:(a|aa|a)+)+$")
    assert time.monotonic() - begun < 5


def test_keywords() -> None:
    asked: dict[str, Any] = {"all": ["refund"], "any": ["card", "bank account"], "none": ["sorry"]}
    assert score("A refund to your bank\naccount.", kind="keywords", **asked) == 1
    assert score("A refund.", kind="keywords", **asked) == 0
    assert score("Sorry, a refund to your card.", kind="keywords", **asked) == 0
    assert score("refunds to your card", kind="keywords", **asked) == 0
    with pytest.raises(ValidationError, match="give keywords"):
        fault(kind="keywords")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One.", 1),
        ("One. Two! Three?", 3),
        ("Dr. Ng pays 3.50 e.g. for tea. Yes.", 2),
        ("no stop", 1),
        ("Title\n- a\n- b.", 3),
        ("He said \u201cGo.\u201d She went...", 2),
        ("\u4f60\u597d\u3002\u518d\u89c1\u3002", 2),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert sentences(text) == count


def test_words_and_bullets() -> None:
    assert words("It's a well-known co-op: 3 items.") == ["It's", "a", "well-known", "co-op", "3", "items"]
    assert bullets("- a\n * b\n-c\n\u2022 d\n--\n1. e") == 3
    assert bullets("1. a\n2) b\n- c", numbered=True) == 2


def test_lengths_and_bullets() -> None:
    assert score("one two three", kind="length", min=3, max=3) == 1
    assert score("one two three", kind="length", max=2) == 0
    assert score("One. Two.", kind="length", unit="sentences", min=2) == 1
    assert score("abc", kind="length", unit="characters", max=3) == 1
    assert score("a\n\nb", kind="length", unit="lines", min=2, max=2) == 1
    three = "- a\n- b\n- c"
    assert score(three, kind="bullets", min=3, max=3, only=True) == 1
    assert score("Here:\n" + three, kind="bullets", min=3, max=3) == 1
    assert score("Here:\n" + three, kind="bullets", min=3, max=3, only=True) == 0
    with pytest.raises(ValidationError, match="min 3 is above max 2"):
        fault(kind="length", min=3, max=2)


@pytest.mark.parametrize(
    "text", ["", "{", "{'a': 1}", "NaN", '{"a": 1} and more', "[" * 100_000, "1" * 5000, "```json\n{}\n```"]
)
def test_no_json(text: str) -> None:
    assert score(text, kind="json") == 0


@settings(max_examples=20)
@given(
    st.recursive(st.none() | st.integers() | WORDS, lambda of: st.lists(of) | st.dictionaries(WORDS, of), max_leaves=8)
)
def test_all_json_is_json(value: Any) -> None:
    assert score(json.dumps(value), kind="json") == 1


def test_json_with_fields() -> None:
    assert score('```json\n{"a": 1, "b": 2}\n```', kind="json", fenced=True, fields=["b", "a"]) == 1
    assert score('{"a": 1}', kind="json", fields=["b", "a"]) == 0
    assert score("[]", kind="json", type="object") == 0
    assert score('{"p": "RET-03"}', "RET-03", kind="json_field", field="p") == 1
    assert score('{"p": "ret 03"}', "RET-03", kind="json_field", field="p", normalise=True) == 1
    assert score('{"p": 1}', True, kind="json_field", field="p") == 0
    assert score("[]", "RET-03", kind="json_field", field="p") == 0


def test_json_schema() -> None:
    schema = {
        "type": "object",
        "required": ["id"],
        "properties": {"id": {"$ref": "#/$defs/id"}},
        "$defs": {"id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"}},
    }
    assert score('{"id": "RET-03"}', kind="json_schema", schema=schema) == 1
    assert score('{"id": "x"}', kind="json_schema", schema=schema) == 0
    assert score("{}", kind="json_schema", schema=schema) == 0
    with pytest.raises(CheckError, match="cannot be followed"):
        score("{}", kind="json_schema", schema={"$ref": "#/$defs/none"})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objct"}, "not a JSON Schema"),
        ({"$ref": "http://127.0.0.1:9/x"}, "leads out of the schema"),
        ({"pattern": "("}, "is not a 'regex'"),
    ],
)
def test_an_unusable_schema_is_refused(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        fault(kind="json_schema", schema=schema)


SENTENCES = {
    "en": "The shop is open on Monday, and you can bring the bike with you.",
    "de": "Der Laden ist am Montag offen, und Sie können das Fahrrad mitbringen.",
    "fr": "Le magasin est ouvert le lundi et vous pouvez apporter le vélo avec vous.",
    "es": "La tienda está abierta el lunes y usted puede traer la bicicleta.",
    "it": "Il negozio è aperto il lunedì e si può portare la bicicletta con sé.",
    "pt": "A loja está aberta na segunda-feira e você pode trazer a sua bicicleta.",
    "nl": "De winkel is maandag open en je kunt de fiets met je meenemen.",
    "sv": "Butiken är öppen på måndag och du kan ta med cykeln till oss.",
    "pl": "Sklep jest otwarty w poniedziałek i można do nas przyjść z rowerem.",
    "tr": "Dükkan pazartesi günü ve bisiklet için bir yer var.",
    "id": "Toko ini buka pada hari Senin dan Anda bisa membawa sepeda.",
    "ru": "Магазин открыт в понедельник, и вы можете взять велосипед.",
    "uk": "Крамниця відчинена в понеділок, і ви можете взяти свій велосипед.",  # noqa: RUF001
    "el": "Το κατάστημα είναι ανοιχτό τη Δευτέρα.",  # noqa: RUF001
    "ja": "店は月曜日に開いています。",
    "zh": "商店星期一营业。",
    "ko": "가게는 월요일에 엽니다.",
    "ar": "المتجر مفتوح يوم الاثنين.",
    "fa": "فروشگاه روز دوشنبه باز است و شما چهار دوچرخه می‌گیرید.",
    "hi": "दुकान सोमवार को खुली है।",
    "th": "ร้านเปิดวันจันทร์",
}


@pytest.mark.parametrize(("code", "text"), SENTENCES.items())
def test_languages(code: str, text: str) -> None:
    assert language(text) == code
    assert score(text, kind="language", language=code) == 1
    assert score(text, kind="language", language="en" if code != "en" else "de") == 0


@pytest.mark.parametrize("text", ["", "42", "Norrbrook Skarn", "zxcv qwer asdf"])
def test_a_text_without_a_language(text: str) -> None:
    assert language(text) is None


def test_a_checker_says_what_it_needs() -> None:
    assert fault(kind="exact") == "needs a reference: give the row (or the checker) one"
    assert fault("", kind="exact") == "needs a text to compare with"
    assert fault("seven", kind="number") == "needs a number to compare with"
    assert fault(True, kind="number") == "needs a number to compare with"
    assert fault("E", kind="choice") == "needs one letter of ABCD to compare with"
    assert fault([1, {}], kind="json_field", field="a") == "needs a text or number to compare with"
    with pytest.raises(ValidationError, match="language 'xx' is not known"):
        fault(kind="language", language="xx")
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        fault(kind="judge")
