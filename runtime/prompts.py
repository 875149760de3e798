"""From what a user names to the texts that are embedded: checked prompts, and how templates apply to them.

The rule, for a prompt after cleaning:

1. A prompt that is already a caption is used alone: it matches one of the templates ("itap of a dog"), names a picture
   ("a photo of a dog", "a drawing of two cats"), or is a sentence ("there is a dog", "the dog is asleep", four words
   or more that end in a full stop).
2. A phrase that brings its own determiner ("a dog", "the red mug", "my cup", "some dogs", "two cats", "someone") takes
   the place of the template's whole noun phrase with its determiner, adjectives and plural s: "a photo of the large
   {}." becomes "a photo of a dog.". Templates that become equal count once. A number counts only before a plural: a
   "two wheeler" is a class name.
3. Anything else is a bare class name ("dog", "traffic light") and gets every template as it is.

Only 3 is in the published protocol; 1 and 2 keep prompts good English ("a photo of a a dog" is not).
"""

import collections
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .tokenizer import clean_text, shortened

PROTOCOL_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of many {}.",
    "a photo of {}s.",
)
"""Templates of the published evaluation (TCL, Cha et al., CVPR 2023)."""

# fmt: off
_DETERMINERS = frozenset([
    "a", "an", "the", "this", "that", "these", "those", "my", "your", "his", "her", "its", "our", "their", "whose",
    "one", "some", "any", "each", "every", "either", "neither", "many", "much", "few", "several", "most", "enough",
])
_COUNTS = frozenset([
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "thirty",
    "forty", "fifty", "hundred", "thousand", "dozen", "half", "both", "all",
])
_PLURALS = frozenset([
    "people", "men", "women", "children", "feet", "teeth", "mice", "geese", "sheep", "fish", "deer", "oxen", "cattle",
    "dice", "aircraft",
])
_PRONOUNS = frozenset([
    "someone", "somebody", "something", "anyone", "anybody", "anything", "everyone", "everybody", "everything",
])
_LINKS = frozenset(["of", "in", "on", "at", "with", "from", "by", "for", "is", "are", "was", "were"])
# fmt: on
_AMOUNTS = re.compile(r"(?:lots|plenty|loads|dozens|hundreds|thousands) of ")
_PICTURE = re.compile(
    r"(?:[\w'-]+ ){0,5}?(?:photo|photograph|picture|image|snapshot|painting|drawing|sketch|illustration|rendering|"
    r"render|close-up|closeup|shot|view|itap|art) (?:of|with|showing) "
)
_SENTENCE_START = re.compile(r"(?:there|it|he|she|they|we|you|i|here)(?:'s|'re|'m| is| are| was| were| see| can see) ")
_FINITE_VERB = re.compile(r"(?:[\w'-]+ )+?(?:is|are|was|were|isn't|aren't|has|have) ")
_RELATIVE = re.compile(r" (?:that|which|who|whose|where|when|while|as) ")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptSet:
    """Prompts with their embeddings, ready to be compared with features; each name once, for results go by names.

    names: the N prompts as the user wrote them, white space tidied.
    embeddings: (N, D) float32, of unit length; read-only, for Segmenters remember it. A writable array is copied.
    key: `Bundle.text_encoder_hash` of the text encoder that made them.
    """

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]
    key: str

    def __post_init__(self) -> None:
        array = self.embeddings
        if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 2:
            raise InputError("embeddings should be a float32 array of shape (N, D)")
        if len(array) != len(self.names) or not self.names:
            raise InputError(f"{len(self.names)} names for {len(array)} embeddings; give one name each, at least one")
        repeated = [name for name, count in collections.Counter(self.names).items() if count > 1]
        if repeated:
            message = f"the name {shortened(repeated[0])!r} stands for two prompts or more. Name each thing once"
            raise InputError(message, name=repeated[0])
        if not np.isfinite(array).all() or np.abs(np.linalg.norm(array, axis=1) - 1).max() > 1e-3:
            raise InputError("embeddings should be finite and of unit length")
        if array.flags.writeable:
            own = array.copy()
            own.flags.writeable = False
            object.__setattr__(self, "embeddings", own)

    def __len__(self) -> int:
        return len(self.names)


def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """Check a list of prompts and tidy their white space; cleaning for the model comes later.

    Raises:
        InputError: not a list of texts, none at all, an empty one, or two that are the same after cleaning.
    """
    if isinstance(prompts, str):
        raise InputError(f"prompts should be a list of texts, found one text: [{shortened(prompts)!r}] is a list")
    if not len(prompts):
        raise InputError("there are no prompts. Name at least one thing to look for")
    seen: dict[str, int] = {}
    for number, prompt in enumerate(prompts, start=1):
        cleaned = _cleaned_prompt(prompt, number)
        first = seen.setdefault(cleaned, number)
        if first != number:
            message = f"prompts {first} and {number} are the same: {shortened(cleaned)!r}. Name each thing once"
            raise InputError(message, prompt=prompt)
    return tuple(" ".join(prompt.split()) for prompt in prompts)


def expand_prompt(prompt: str, templates: Sequence[str]) -> list[str]:
    """Texts that are embedded and averaged for one prompt; see the rule at the top of this file.

    Args:
        prompt: what the user named.
        templates: each with one "{}".

    Returns:
        One text or more, without repeats.

    Raises:
        InputError: the prompt is empty, or a template has not exactly one "{}".
    """
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f'a template should hold one "{{}}", found {template!r}')
    cleaned = _cleaned_prompt(prompt, 1)
    if _is_caption(cleaned, templates) or not templates:
        return [cleaned]
    named = cleaned.rstrip(".!?").rstrip() or cleaned  # "a dog." is the phrase "a dog"
    if _is_phrase(named):
        return list(dict.fromkeys(_with_phrase(template, named) for template in templates))
    return list(dict.fromkeys(template.replace("{}", named) for template in templates))


def unknown_words(prompts: Iterable[str], vocabulary: Iterable[str]) -> list[str]:
    """Words of the prompts that a vocabulary does not hold, in order, each once; "a", "of" and so on are known."""
    known = {clean_text(word) for word in vocabulary} | _DETERMINERS | _LINKS | {"and", "to"}
    words = (part for prompt in prompts for word in clean_text(prompt).split() for part in word.split("-"))
    bare = (word.strip(".,;:!?\"'()[]") for word in words)
    return list(dict.fromkeys(word for word in bare if word and word not in known))


def _cleaned_prompt(prompt: str, number: int) -> str:
    cleaned = clean_text(prompt)
    if all(unicodedata.category(character)[0] in "ZC" for character in cleaned):  # nothing that can be seen
        raise InputError(f"prompt {number} is empty: {prompt!r}. Name the thing to look for", prompt=prompt)
    return cleaned


def _is_caption(cleaned: str, templates: Sequence[str]) -> bool:
    return (
        any(_matches(template, cleaned) for template in templates)
        or _PICTURE.match(cleaned) is not None
        or _is_sentence(cleaned)
    )


def _matches(template: str, cleaned: str) -> bool:
    """Whether the prompt is this template, filled in; templates of few words ("a {}.") say nothing."""
    before, after = (re.escape(part) for part in template.lower().rstrip(".").split("{}"))
    fixed_words = len(template.replace("{}", " ").split())
    return fixed_words > 2 and re.fullmatch(f"{before}.+{after}[.!?]?", cleaned) is not None


def _is_sentence(cleaned: str) -> bool:
    if cleaned.endswith((".", "!", "?")) and len(cleaned.split()) >= 4:
        return True
    if _SENTENCE_START.match(cleaned):
        return True
    verb = _FINITE_VERB.match(cleaned)
    return verb is not None and not _RELATIVE.search(verb.group())


def _is_phrase(named: str) -> bool:
    first, *rest = named.split()
    if first in _PRONOUNS or _AMOUNTS.match(named):
        return True
    if first in _COUNTS or first.isdecimal():
        return _is_plural(rest)
    return bool(rest) and first in _DETERMINERS


def _is_plural(words: Sequence[str]) -> bool:
    """Whether what was counted is a plural, or brings a determiner ("all the water", "two of them")."""
    if words[:1] == ["of"] or (words and words[0] in _DETERMINERS):
        return True
    counted = list(itertools.takewhile(lambda word: word not in _LINKS, words))
    return bool(counted) and (counted[-1] in _PLURALS or counted[-1].endswith("s"))


def _with_phrase(template: str, phrase: str) -> str:
    """Fill a template with a phrase in the place of the template's own noun phrase."""
    before, after = template.split("{}")
    words = before.split(" ")  # the last is empty where a space comes before the slot
    for index in reversed(range(len(words))):
        if words[index].lower() in _LINKS or words[index].endswith((":", ",", ";")):
            break
        if words[index].lower() in _DETERMINERS:
            before = "".join(kept + " " for kept in words[:index])
            break
    return before + phrase + re.sub(r"^\w+", "", after)
