"""Question answering among distractors: RULER's task after SQuAD (arXiv:2404.06654, 3.4)."""

from collections.abc import Sequence

from t5g2.errors import UserError
from t5g2.longcontext.draws import Draws
from t5g2.longcontext.material import Material
from t5g2.longcontext.problems import Problem


def question_answering(key: Sequence[object], material: Material, length: int) -> Problem:
    """A question, and the paragraph that answers it among paragraphs that do not.

    The others are those of the other questions, each once before any is repeated. The size is the
    number of paragraphs.

    Raises:
        UserError: there are no questions.
    """
    if not material.questions:
        raise UserError("needs questions with paragraphs: give --questions")
    draws = Draws(*key)
    asked = draws.choice(material.questions)
    paragraphs = dict.fromkeys(question.paragraph for question in material.questions)
    others = draws.shuffled([text for text in paragraphs if text != asked.paragraph])
    instruction = "Answer the question with words from the documents, and with nothing else.\n\n"

    def prompt(size: int) -> str:
        documents = (others * -(-(size - 1) // len(others)))[: size - 1]
        documents.insert(Draws(*key, "place").below(size), asked.paragraph)
        listed = "\n\n".join(
            f"Document {number}:\n{document}" for number, document in enumerate(documents, 1)
        )
        return f"{instruction}{listed}\n\n{instruction}Question: {asked.question}\nAnswer:"

    return Problem(
        prompt=prompt,
        least=1,
        references=asked.answers,
        answer=f" {asked.answers[0]}",
        closing="\n",
    )
