"""Normalise answers as the VQA challenge does, and in TextVQA's variant.

Input: an answer in words. Output: its form for comparison by equality. Used by ``vqa`` and
``submission``.

The published rules (visualqa.org/evaluation): lower case; drop periods that are not decimal points;
number words become digits; drop articles; restore the apostrophe of contractions; every other mark
but apostrophe and colon becomes a space, and a comma between digits is dropped. The published
program differs in three points. This module follows the program, because the published figures are
its output:

* it drops a mark without leaving a space if one mark of the same kind is next to a space, or if a
  comma is between digits anywhere in the answer;
* it keeps a period before a digit, and drops all others, also after a digit;
* it looks for marks in the answer before other rules; articles and numbers are whole words.

Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py; facebookresearch/mmf,
pythia/tasks/processors.py, EvalAIAnswerProcessor, which LLaVA uses for TextVQA and for submissions.
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


CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTED.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # a slip of the published table
"""A contraction without one of its apostrophes -> its form in the published table."""


def normalise(answer: str) -> str:
    """Return an answer in the VQA challenge's form.

    >>> normalise("The two dogs, 1,000 of them.")
    '2 dogs 1000 of them'
    """
    return _words(_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def normalise_evalai(answer: str) -> str:
    """Return an answer in TextVQA's form: first drop commas and question marks, split off 's.

    LLaVA also submits answers to VQAv2 and VizWiz in this form.
    """
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(answer)


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
