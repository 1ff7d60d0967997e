"""What a corpus keeps of many documents."""

import random

from deduplicate import Deduplicator, Document

WORDS = [f"{a}{b}" for a in ("lo", "mi", "ru", "sta", "ve", "kon") for b in ("ra", "ti", "nus")]


def prose(seed: int, words: int = 25) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=words)) + "."


def text(*seeds: int) -> str:
    return "\n\n".join(prose(seed) for seed in seeds)


def document(path: str, content: str) -> Document:
    return Document("p", path, content)


def kept(*documents: Document) -> list[str]:
    return [document.path for document in Deduplicator().kept(documents)]


def test_of_equal_documents_the_first_by_source_stays() -> None:
    same = text(1, 2, 3)
    assert kept(document("b", same), document("a", same), document("c", text(4, 5, 6))) == [
        "a",
        "c",
    ]


def test_documents_that_differ_in_case_numbers_and_spaces_are_equal() -> None:
    assert kept(
        document("a", "Version 1.\n" + text(1, 2, 3)),
        document("b", "VERSION 2.\n" + text(1, 2, 3).replace(" ", "  ")),
    ) == ["a"]


def test_a_document_goes_if_more_than_half_of_it_stands_in_others() -> None:
    first = document("a", text(1, 2, 3, 4))
    assert kept(first, document("b", text(1, 2, 3, 9))) == ["a"]
    assert kept(first, document("b", text(1, 7, 8, 9))) == ["a", "b"]


def test_scraps_and_markup_go() -> None:
    numbers = "\n".join(f"0x{i:08x}, {{ 1, 2, 3 }};" for i in range(100))
    deduplicator = Deduplicator()
    assert not deduplicator.kept([document("a", "Too short."), document("b", numbers)])
    assert deduplicator.dropped == {"too short": 1, "mostly markup": 1}


def test_a_notice_in_many_documents_stays_in_the_first_only() -> None:
    documents = [
        document(f"{i:02}", f"{text(3 * i, 3 * i + 1, 3 * i + 2)}\n\n{prose(999)}")
        for i in range(20)
    ]
    result = Deduplicator().kept(documents)
    assert len(result) == 20
    assert [prose(999) in document.text for document in result] == [True] + [False] * 19


def test_a_paragraph_that_follows_itself_stays_once() -> None:
    (result,) = Deduplicator().kept([document("a", f"Off\n\nOff\n\n{text(1, 2, 3)}\n\nOff")])
    assert result.text == f"Off\n\n{text(1, 2, 3)}\n\nOff"


def test_untranslated_prose_goes_and_listings_and_names_stay() -> None:
    deduplicator = Deduplicator()
    listing = "ls --all /usr/share/doc\ncp -r a b\nmake -j2 all"
    deduplicator.kept(
        [document("en", f"Short one here.\n\nStatus\n\n{listing}\n\n{text(1, 2)}")],
        is_original=True,
    )
    translated = f"{text(11, 12, 13)}\n\nStatus\n\n{listing}"
    (result,) = deduplicator.kept(
        [document("de", f"Short one here.\n\n{translated}\n\n{prose(1)}")],
    )
    assert result.text == translated


def test_what_is_kept_of_a_language_does_not_depend_on_other_languages() -> None:
    alone, after = Deduplicator(), Deduplicator()
    after.kept([document("fr", text(1, 2, 3))])
    german = [document("de", text(1, 2, 3))]
    assert alone.kept(german) == after.kept(german) == german
