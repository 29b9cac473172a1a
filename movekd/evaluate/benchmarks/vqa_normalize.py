"""Answers as the VQA challenge compares them: its normalisation, and TextVQA's variant of it.

Comes in: an answer in words. Goes out: the form in which answers are compared by equality. Used by
``vqa`` and by the upload files.

The published rules (visualqa.org/evaluation): lower case; a period goes unless it is a decimal
point; number words become digits; articles go; a contraction gets its apostrophe back; all other
punctuation but apostrophe and colon becomes a space, and a comma between digits goes without one.
Where the published program does more or less than its text, the program is followed, because the
published figures are its output:

* a mark is taken out without leaving a space as soon as one of its kind stands beside a space, or a
  comma stands between digits anywhere in the answer;
* a period stays before a digit, and goes everywhere else, behind a digit too;
* marks are looked for in the answer as it came; articles and numbers are whole words.

Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py; facebookresearch/mmf,
pythia/tasks/processors.py, EvalAIAnswerProcessor, which LLaVA takes for TextVQA and for uploads.
"""

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED.split())} | {"none": "0"}

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    """Return the ways to write a contraction with one of its apostrophes forgotten."""
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {
    misspelt: word for word in _CONTRACTED.split() for misspelt in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}  # the last one is the published table's own slip
"""A contraction without one of its apostrophes -> as the published table writes it."""


def normalise(answer: str) -> str:
    """Return an answer in the VQA challenge's form.

    >>> normalise("The two dogs, 1,000 of them.")
    '2 dogs 1000 of them'
    """
    return _words(_punctuation(_one_line(answer)))


def normalise_evalai(answer: str) -> str:
    """Return an answer in TextVQA's form: commas and question marks go first, 's stands alone.

    LLaVA brings answers into this form before it uploads them for VQAv2 and VizWiz, too.
    """
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(answer)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(answer: str) -> str:
    """Return an answer without marks other than apostrophe, colon and decimal point."""
    has_grouped_digits = _COMMA_IN_NUMBER.search(answer) is not None
    bare = answer
    for mark in _MARKS:
        is_beside_space = f"{mark} " in answer or f" {mark}" in answer
        bare = bare.replace(mark, "" if is_beside_space or has_grouped_digits else " ")
    return _PERIOD.sub("", bare)


def _words(answer: str) -> str:
    """Return an answer in lower case, its numbers as digits, without articles."""
    numbered = (_NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)
