"""Find what a conversation teaches, and how its turns differ from what LLaVA expects.

Input: a ``Conversation``. Output: why it is left out, and what else ``movekd shards pack`` says
about it. Training itself does with the turns what LLaVA does.
"""

from movekd.corpus.conversations import Conversation
from movekd.corpus.media import unknown_placeholder
from movekd.corpus.report import ProblemKind

Finding = tuple[ProblemKind, str]
"""Kind and reason of a problem."""


def find_refusal(conversation: Conversation) -> Finding | None:
    """Return why a conversation teaches nothing, or is about what movekd does not read."""
    for role, text in conversation.turns:
        if role == "human" and (found := unknown_placeholder(text)):
            return "unknown_media", f"its text has {found}; only images are read"
    answers = [text for role, text in _trained_turns(conversation) if role == "gpt"]
    if not answers:
        return "no_answers", "it has no answer to learn; expected a turn of gpt behind a question"
    if not any(text.strip() for text in answers):
        # Training would teach to stop at once.
        return "empty_answers", "all its answers are empty or blank"
    return None


def find_oddities(conversation: Conversation) -> list[Finding]:
    """Return what is unusual about the turns of a conversation that is kept."""
    found: list[Finding] = []
    turns = _trained_turns(conversation)
    num_blank = sum(role == "gpt" and not text.strip() for role, text in turns)
    if num_blank:
        found.append(("blank_answers", f"{num_blank} of its answers are empty or blank"))
    if conversation.turns[0][0] == "gpt":
        reason = "its first turn is an answer, which prompt v1 leaves out as LLaVA does"
        only = "its only turn is an answer; expected a question before it"
        found.append(("leading_answers", only if turns == conversation.turns else reason))
    roles = [role for role, _ in turns]
    expected = ["human", "gpt"] * (len(turns) // 2)
    if roles not in (expected, ["gpt"]):
        # Source: haotian-liu/LLaVA llava/train/train.py, preprocess_v1: an assertion on the order;
        # a last question without an answer makes the counts of tokens differ.
        reason = f"its turns are {', '.join(roles[:8])}; LLaVA expects human, gpt, human, gpt ..."
        found.append(("unordered_turns", reason))
    return found


def _trained_turns(conversation: Conversation) -> tuple[tuple[str, str], ...]:
    """Return the turns without a leading answer, unless it is all."""
    turns = conversation.turns
    return turns[1:] if turns[0][0] == "gpt" and len(turns) > 1 else turns
