"""Skills of the demo model: a seed in, questions with one right answer out.

Every row is ``{"question", "answer"}``; the text is ``question + " " + answer``. A row belongs to the
held-out part when a hash of its question says so, whatever the seed, so no evaluation question is ever trained on or
calibrated with. ``facts`` is the exception: what is to be remembered must have been seen.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Literal, TypedDict

Split = Literal["train", "test"]
HELD_OUT_SHARE = 0.1


class Row(TypedDict):
    """A question and its one right answer."""

    question: str
    answer: str


def rows(skill: str, n: int, *, split: Split, seed: int) -> list[Row]:
    """Draw ``n`` distinct rows of a skill, the same ones for the same arguments.

    A skill with few different rows in the split, such as ``facts``, gives fewer than ``n``.
    """
    rng = random.Random(f"{skill}/{split}/{seed}")
    drawn: dict[str, Row] = {}

    # About one row in ten is of the split ``test``: 50 attempts a row are plenty, and end where a skill has few rows.
    for row in _attempts(SKILLS[skill], rng, 50 * n):
        # A fact that was never seen cannot be known, so ``facts`` has the same rows in both splits.
        if skill == "facts" or _is_held_out(row["question"]) == (split == "test"):
            drawn.setdefault(row["question"], row)
        if len(drawn) == n:
            break

    return list(drawn.values())


def _attempts(skill: Callable[[random.Random], Row], rng: random.Random, n: int) -> Iterator[Row]:
    return (skill(rng) for _ in range(n))


def _is_held_out(question: str) -> bool:
    """Return whether a question is of the split ``test``, by a hash of its text."""
    return hashlib.sha256(question.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def arithmetic(rng: random.Random) -> Row:
    """Draw a sum or a difference, never negative, of two numbers below 100: ``37 + 45 = 82``."""
    a = rng.randrange(100)
    b = rng.randrange(100)
    if rng.random() < 0.5:
        return Row(question=f"{a} + {b} =", answer=str(a + b))

    # The larger one first, so that no answer is negative.
    smaller, larger = sorted((a, b))
    return Row(question=f"{larger} - {smaller} =", answer=str(larger - smaller))


def reverse(rng: random.Random) -> Row:
    """Draw a string of 4 to 7 letters to be written backwards: ``reverse stone: enots``."""
    word = _letters(rng)
    return Row(question=f"reverse {word}:", answer=word[::-1])


def sort(rng: random.Random) -> Row:
    """Draw a string of 4 to 7 letters to be sorted: ``sort stone: enost``."""
    word = _letters(rng)
    return Row(question=f"sort {word}:", answer="".join(sorted(word)))


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 7)))


def logic(rng: random.Random) -> Row:
    """Draw a boolean expression of two or three values: ``not (true or false) and true is false``."""
    text = _expression(rng, rng.randint(2, 3))
    # The grammar below makes only true, false, and, or, not and brackets: nothing else is ever evaluated.
    value = eval(text.replace("true", "True").replace("false", "False"), {"__builtins__": {}})  # noqa: S307
    return Row(question=f"{text} is", answer=str(value).lower())


def _expression(rng: random.Random, n_values: int) -> str:
    """Draw a boolean expression of ``n_values`` values."""
    if n_values == 1:
        return rng.choice(["true", "false", "not true", "not false"])

    n_left = rng.randint(1, n_values - 1)
    left = _expression(rng, n_left)
    right = _expression(rng, n_values - n_left)
    joined = f"{_bracketed(left)} {rng.choice(['and', 'or'])} {_bracketed(right)}"
    return f"not ({joined})" if rng.random() < 0.2 else joined


def _bracketed(text: str) -> str:
    """Return an expression that can stand beside an operator, whatever the two operators are."""
    return f"({text})" if " and " in text or " or " in text else text


def facts(rng: random.Random) -> Row:
    """Draw a country and its capital: ``The capital of France is Paris``."""
    country = rng.choice(list(CAPITALS))
    return Row(question=f"The capital of {country} is", answer=CAPITALS[country])


def prose(rng: random.Random) -> Row:
    """Draw a short story whose last word, an object named before, is to be found."""
    name, friend = rng.sample(NAMES, 2)
    thing, other = rng.sample(THINGS, 2)
    opening = rng.choice(OPENINGS).format(name=name, friend=friend, thing=thing, other=other, place=rng.choice(PLACES))
    ending = rng.choice(ENDINGS).format(name=name, friend=friend)
    return Row(question=f"{opening} {ending}", answer=thing)


SKILLS: dict[str, Callable[[random.Random], Row]] = {
    "arithmetic": arithmetic,
    "reverse": reverse,
    "sort": sort,
    "logic": logic,
    "facts": facts,
    "prose": prose,
}

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Will".split()
THINGS = (
    "ball basket bell boat book bottle box brush candle chair clock coat cup drum feather flag "
    "flute hat jar kite knife lamp letter map mirror needle pencil pillow plate ring rope scarf shell "
    "shoe spoon stone sword ticket watch"
).split()
PLACES = "park garden kitchen forest market school attic harbor station field".split()
OPENINGS = [
    "{name} found a {thing} in the {place} while {friend} was looking for a {other}.",
    "One day {name} bought a {thing} at the {place}. {friend} already had a {other}.",
    "In the {place}, {friend} was holding a {other} and {name} was holding a {thing}.",
    "{friend} lost a {other} near the {place}, but {name} kept a {thing} safe.",
    "{name} came from the {place} with a {thing}, and {friend} came with a {other}.",
]
ENDINGS = [
    "After dinner {name} put away the",
    "In the evening {name} gave {friend} the",
    "Before going home {name} looked once more at the",
    "The next morning {name} could not find the",
    "Everyone wanted to know where {name} got the",
]
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Greece": "Athens", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin",
    "Iceland": "Reykjavik", "Belgium": "Brussels", "Croatia": "Zagreb", "Serbia": "Belgrade",
    "Bulgaria": "Sofia", "Romania": "Bucharest", "Ukraine": "Kyiv", "Estonia": "Tallinn", "Latvia": "Riga",
    "Lithuania": "Vilnius", "Slovakia": "Bratislava", "Slovenia": "Ljubljana", "Albania": "Tirana",
    "Malta": "Valletta", "Cyprus": "Nicosia", "Turkey": "Ankara", "Georgia": "Tbilisi", "Armenia": "Yerevan",
    "Russia": "Moscow", "China": "Beijing", "Japan": "Tokyo", "India": "New Delhi", "Nepal": "Kathmandu",
    "Bhutan": "Thimphu", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Laos": "Vientiane", "Malaysia": "Kuala Lumpur",
    "Indonesia": "Jakarta", "Mongolia": "Ulaanbaatar", "Pakistan": "Islamabad", "Bangladesh": "Dhaka",
    "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus", "Lebanon": "Beirut", "Jordan": "Amman",
    "Oman": "Muscat", "Qatar": "Doha", "Yemen": "Sanaa", "Egypt": "Cairo", "Libya": "Tripoli", "Tunisia": "Tunis",
    "Algeria": "Algiers", "Morocco": "Rabat", "Sudan": "Khartoum", "Ethiopia": "Addis Ababa", "Kenya": "Nairobi",
    "Uganda": "Kampala", "Tanzania": "Dodoma", "Rwanda": "Kigali", "Ghana": "Accra", "Nigeria": "Abuja",
    "Senegal": "Dakar", "Mali": "Bamako", "Niger": "Niamey", "Chad": "Djamena", "Angola": "Luanda",
    "Zambia": "Lusaka", "Zimbabwe": "Harare", "Namibia": "Windhoek", "Botswana": "Gaborone",
    "Mozambique": "Maputo", "Madagascar": "Antananarivo", "Canada": "Ottawa", "Mexico": "Mexico City",
    "Cuba": "Havana", "Jamaica": "Kingston", "Haiti": "Port au Prince", "Panama": "Panama City",
    "Colombia": "Bogota", "Venezuela": "Caracas", "Ecuador": "Quito", "Peru": "Lima", "Bolivia": "Sucre",
    "Chile": "Santiago", "Argentina": "Buenos Aires", "Uruguay": "Montevideo", "Paraguay": "Asuncion",
    "Brazil": "Brasilia", "Guyana": "Georgetown", "Suriname": "Paramaribo", "Australia": "Canberra",
    "New Zealand": "Wellington", "Fiji": "Suva", "Samoa": "Apia", "Tonga": "Nukualofa", "Kazakhstan": "Astana",
}  # fmt: skip
