"""The language of a text: by its script, and among languages of the Latin script by their commonest words.

No library, because suites ask whether an answer is in one of a few widely used languages, and texts of a sentence or
more hold several of these words. A text of names or numbers alone has no language here.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from evals.checker import Checker, Score, right_if
from evals.words import words

COMMON = {
    "en": "the of and to in is that it was for on are with as be this have from or by not but what you your we they "
    "which an at can will has i",
    "de": "der die das und ist nicht ein eine ich sie es zu den mit von auf für im dem sich auch wie wir werden aus "
    "bei oder sind haben wird einen nach",
    "fr": "le la les des et est un une que qui dans pour pas sur vous nous il elle au aux du avec ce cette sont plus "
    "ne se par je votre",
    "es": "el la los las que y es un una en por para con del se no su al lo como más pero sus está son este esta muy "
    "también usted ser",
    "it": "il la le gli di che e è un una per non con del della sono si da come più anche nel alla ma questo questa "
    "lo dei delle nella essere",
    "pt": "o a os as que e é um uma não para com do da dos em se por mais como mas ao no na são você também está ser "
    "seu sua",
    "nl": "de het een en van is dat niet te in op zijn voor met die aan ook wordt als er maar om bij je wij naar dan "
    "deze kunnen worden uit",
    "sv": "och det att en ett som är på för med inte av till den har jag kan vi men om från du eller så var ska hur "
    "man sig detta",
    "da": "og det at en et som er på for med ikke af til den har jeg kan vi men om fra du eller så var skal hvordan "
    "man sig dette",
    "pl": "i w na się nie jest to z że do jak o co po ale od są za przez oraz tak dla lub być jego który która tym "
    "może już",
    "cs": "a je se na že to v s z do pro jsou jako které být nebo ale si by který tak jeho jak po také může jsem jen "
    "už podle",
    "tr": "ve bir bu için ile da de çok olarak daha olan ne gibi var en kadar sonra ama değil mi veya her olur ise "
    "ancak o şey",
    "fi": "ja on ei se että oli hän ovat mutta kun niin myös tai joka ole mitä kuin voi sen ne jos sekä tämä olla "
    "siitä vain",
    "id": "yang dan di untuk dengan ini itu dari tidak adalah dalam pada akan atau juga ke oleh bisa ada dapat saya "
    "anda karena seperti",
    "vi": "và của là không có được cho các một trong những với người này đã để khi bạn từ như cũng nhưng vào nhiều",
}
COMMON_WORDS = {language: frozenset(text.split()) for language, text in COMMON.items()}
SCRIPTS = {
    "CYRILLIC": "ru",
    "GREEK": "el",
    "HEBREW": "he",
    "ARABIC": "ar",
    "DEVANAGARI": "hi",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
    "HANGUL": "ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "zh",
}
TOLD_APART = {
    "uk": ("ru", frozenset("іїєґ")),
    "fa": ("ar", frozenset("پچژگ")),
    "ur": ("ar", frozenset("ٹڈڑںے")),
}
"""Languages of a script that letters of their own tell from its commonest one."""
KNOWN = tuple(sorted({*COMMON, *SCRIPTS.values(), *TOLD_APART}))
LEAST_SHARE = 0.12
"""Of the words of a running text, common words are a third or more; of another language's, hardly any."""


def language(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, one of `KNOWN`; None where it cannot be told."""
    letters = [letter for letter in text.casefold() if letter.isalpha()]
    if not letters:
        return None
    scripts = Counter(unicodedata.name(letter, "").split(" ", 1)[0].split("-")[0] for letter in letters)
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * len(letters):
        return "ja"
    script, most = scripts.most_common(1)[0]
    if most < 0.5 * len(letters):
        return None
    if script == "LATIN":
        return _latin(text)
    found = SCRIPTS.get(script)
    for other, (like, own) in TOLD_APART.items():
        if found == like and sum(letter in own for letter in letters) > 0.01 * len(letters):
            return other
    return found


def _latin(text: str) -> str | None:
    found = [word.casefold() for word in words(text)]
    counts = {code: sum(word in common for word in found) for code, common in COMMON_WORDS.items()}
    best = max(counts, key=lambda code: counts[code])
    tied = [code for code, count in counts.items() if count == counts[best]]
    if counts[best] < LEAST_SHARE * len(found) or len(tied) > 1:
        return None
    return best


class Language(Checker):
    """The answer is in a language."""

    kind: Literal["language"]
    language: str = Field(description=f"One of {', '.join(KNOWN)}.")

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.language not in KNOWN:
            raise ValueError(f"language {self.language!r} is not known: use one of {', '.join(KNOWN)}")
        return self

    def check_text(self, text: str, reference: Any) -> Score:  # noqa: ARG002
        found = language(text)
        return right_if(found == self.language, f"is in {found}" if found else "its language cannot be told")
