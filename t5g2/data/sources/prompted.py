"""Prompts with their answers: lines of JSON with an input and a target."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from t5g2.data.image_examples import NOTHING, ImageExample, Tokens
from t5g2.data.sources.documents import Documents
from t5g2.data.sources.jsonl import JsonLines, text_of_json
from t5g2.data.sources.records import BadRecord, BadRecords
from t5g2.data.sources.splits import Numbers
from t5g2.data.tokenizer import Tokenizer

INPUTS, TARGETS = "inputs", "targets"


class PromptedRecords(JsonLines):
    """The lines of JSON Lines files, `{"inputs": "...", "targets": "..."}` each."""

    def __init__(self, root: Path, names: list[str]) -> None:
        """Reads every file once, to find its lines.

        Raises:
            UserError: a file cannot be read.
        """
        super().__init__(root, names, INPUTS)

    def text(self, number: int) -> str:
        """Inputs and targets of a line as one text; raises `BadRecord` if one is missing."""
        return "".join(self.read(number))

    def read(self, number: int) -> tuple[str, str]:
        """Inputs and targets of a line.

        Raises:
            BadRecord: a field is missing or no text, or there is no target.
        """
        content, place = self.line(number)
        inputs, targets = (text_of_json(content, field, place) for field in (INPUTS, TARGETS))
        if not targets:
            raise BadRecord(f"{place}: field {TARGETS!r} is empty, nothing to learn")
        return inputs, targets


class PromptedDocuments(Documents):
    """The lines of one split, each with its prompt; they are never split."""

    records: PromptedRecords

    def __init__(
        self, source: str, records: PromptedRecords, numbers: Numbers, bad: BadRecords
    ) -> None:
        """Says which lines; see `Documents`."""
        super().__init__(source, records, numbers, None, bad)

    def example(self, index: int, tokenizer: Tokenizer) -> ImageExample:
        """An example; one of nothing if it is passed over.

        Raises:
            UserError: a bad record too many; it names the file and the line.
        """
        number = self.numbers[index]
        try:
            inputs, targets = self.records.read(number)
        except BadRecord as problem:
            self.bad.add(self.source, number, problem)
            return NOTHING
        # Apart, so that no piece of text belongs to both sides.
        prompt = tokenizer.encode(inputs)
        return ImageExample(np.concatenate([prompt, tokenizer.encode(targets)]), len(prompt), 0)


class PromptedTexts:
    """The lines of one split as examples without images, tokenised when asked for; `ImageExamples`.

    Attributes:
        slot: None: no images.
    """

    slot = None

    def __init__(self, documents: PromptedDocuments, tokenizer: Tokenizer) -> None:
        self.documents = documents
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Tokens:
        return self.example(index).ids

    def __iter__(self) -> Iterator[Tokens]:
        return (self[i] for i in range(len(self)))

    def example(self, index: int) -> ImageExample:
        """See `ImageExamples`.

        Raises:
            UserError: a bad record too many; it names the file and the line.
        """
        return self.documents.example(index, self.tokenizer)

    def images(self, index: int) -> np.ndarray:
        """See `ImageExamples`: there are none."""
        raise ValueError(f"example {index} of source {self.documents.source} has no images")

    def refuse(self, index: int, problem: str) -> None:
        """See `ImageExamples`."""
        documents, number = self.documents, self.documents.numbers[index]
        _, place = documents.records.line(number)
        documents.bad.add(documents.source, number, BadRecord(f"{place}: {problem}"))
