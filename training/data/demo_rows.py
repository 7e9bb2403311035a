"""The demo's instruction rows: true facts, and exercises on short lists, numbers and sentences.

Each task function returns rows. Every fact has several phrasings, so that a held-out row asks for a known fact in new
words. Exercises are sampled from far more possibilities than are used, so that a held-out exercise must be worked out,
not remembered. Some rows are the second turn of a conversation: their question has an answer only after the first turn.
No two rows begin with the same question, so that no held-out conversation begins like one that is trained on."""

from __future__ import annotations

import itertools
import random
from typing import NotRequired, TypedDict


class Row(TypedDict):
    """A row in Alpaca's format. `history` holds [question, answer] of earlier turns; rows of one turn have none."""

    instruction: str
    input: str
    output: str
    history: NotRequired[list[list[str]]]


def pairs(table: str) -> list[list[str]]:
    """Splits a table into [word, rest] pairs, one per entry."""
    return [pair.split(maxsplit=1) for pair in table.split(",")]


KINDS = {
    "animal": "ant bear bee camel cat cow dog duck frog hen lion sheep tiger wolf",
    "fruit": "apple banana cherry grape lemon mango pear plum",
    "colour": "black blue brown green grey red white yellow",
    "vehicle": "bike boat bus car ferry ship train van",
    "tool": "axe drill hammer rake saw spade wrench",
    "instrument": "drum flute guitar harp piano violin",
    "garment": "coat dress glove hat scarf shirt shoe sock",
}
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words.split()}
COLOURS = KINDS["colour"].split()
WORDS = list(KIND_OF)
THINGS = [word for word, kind in KIND_OF.items() if kind != "colour"]

# thing -> the end of the sentence "A thing is a kind that ..."
DESCRIPTIONS = dict(
    pairs("""ant lives in a colony, bear sleeps in winter, bee makes honey, camel lives in the desert,
cat catches mice, cow gives milk, dog guards the house, duck swims on ponds, frog jumps and swims,
hen lays eggs, lion lives in Africa, sheep gives wool, tiger has stripes, wolf hunts in packs,
apple grows on a tree, banana has a yellow peel, grape is made into wine, lemon tastes sour,
bike has two wheels, boat floats on water, bus carries many people, car has four wheels,
train runs on rails, axe chops wood, drill makes holes, hammer drives nails, rake gathers leaves,
saw cuts wood, spade digs the soil, wrench turns bolts, drum is played with sticks, flute is blown,
guitar has six strings, piano has black and white keys, violin is played with a bow,
glove is worn on the hand, hat is worn on the head, scarf is worn around the neck, shoe is worn on the foot""")
)
OPPOSITES = """big small, hot cold, fast slow, good bad, old new, up down, left right, day night, happy sad,
light dark, hard soft, wet dry, rich poor, strong weak, full empty, open closed, clean dirty, loud quiet,
early late, near far, high low, long short, thick thin, wide narrow, deep shallow, sharp blunt, love hate,
win lose, push pull, begin end, buy sell, give take, true false, inside outside, always never, first last,
brave cowardly, rough smooth, sweet bitter, asleep awake"""
CAPITALS = """Austria Vienna, Belgium Brussels, Canada Ottawa, Chile Santiago, China Beijing, Cuba Havana,
Denmark Copenhagen, Egypt Cairo, Finland Helsinki, France Paris, Germany Berlin, Ghana Accra, Greece Athens,
Hungary Budapest, India New Delhi, Iran Tehran, Iraq Baghdad, Ireland Dublin, Italy Rome, Japan Tokyo,
Kenya Nairobi, Morocco Rabat, Norway Oslo, Peru Lima, Poland Warsaw, Portugal Lisbon, Russia Moscow,
Spain Madrid, Sweden Stockholm, Thailand Bangkok, Turkey Ankara, Ukraine Kyiv, Vietnam Hanoi"""
PLURALS = """baby babies, box boxes, brush brushes, bus buses, cat cats, cherry cherries, child children,
church churches, city cities, country countries, day days, dish dishes, dog dogs, dress dresses, duck ducks,
foot feet, fox foxes, goose geese, hat hats, hero heroes, horse horses, key keys, knife knives, lady ladies,
leaf leaves, life lives, loaf loaves, lorry lorries, man men, match matches, mouse mice, ox oxen,
peach peaches, person people, plum plums, pony ponies, potato potatoes, scarf scarves, sheep sheep,
shelf shelves, story stories, tomato tomatoes, tooth teeth, toy toys, tree trees, wife wives, wolf wolves,
woman women"""
PAST_TENSES = """begin began, bring brought, build built, buy bought, catch caught, choose chose, come came,
dance danced, drink drank, drive drove, eat ate, fall fell, find found, fly flew, forget forgot, give gave,
go went, grow grew, jump jumped, keep kept, know knew, learn learned, leave left, look looked, make made,
meet met, play played, ride rode, ring rang, rise rose, run ran, say said, see saw, sell sold, send sent,
sing sang, sit sat, sleep slept, speak spoke, stand stood, steal stole, swim swam, take took, teach taught,
think thought, throw threw, walk walked, wear wore, win won, write wrote"""
NAMES = "Adam Anna Ben Clara Emma Ivan Kate Leo Maria Omar Rosa Tom".split()

# Base form, third person, past tense. Each verb makes sense with every object that one can see and own.
VERBS = """buy buys bought, draw draws drew, find finds found, have has had, lose loses lost, see sees saw,
sell sells sold, want wants wanted"""
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
FOLLOW_UPS = [
    "And after that?",
    "And then?",
    "What comes next?",
    "And the next one?",
    "What comes after that?",
]


def a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def row(instruction: str, output: str, input: str = "") -> Row:
    return {"instruction": instruction, "input": input, "output": output}


def word_lists(rng: random.Random, n: int, longest: int) -> list[list[str]]:
    return [rng.sample(WORDS, rng.randint(2, longest)) for _ in range(n)]


def facts(questions: list[str], answers: dict[str, str]) -> list[Row]:
    """One row per question and key. `{}` in a question stands for the key."""
    return [row(question.format(key), answer) for key, answer in answers.items() for question in questions]


def classify(rng: random.Random) -> list[Row]:
    rows = []
    for word, kind in KIND_OF.items():
        the_word = word if kind == "colour" else a(word)
        sentence = f"{the_word.capitalize()} is {a(kind)}."
        rows += [
            row(f"What kind of thing is {the_word}?", sentence),
            row(f"Say what kind of thing {the_word} is.", sentence),
            row(f"Classify the word {word}.", kind),
            row(f"Which group does {the_word} belong to?", kind),
            row(f"Name the group that {the_word} belongs to.", kind),
        ]
    return rows


def describe(rng: random.Random) -> list[Row]:
    questions = [
        "Describe {}.",
        "What is {}?",
        "Tell me about {}.",
        "Explain what {} is.",
        "Write a sentence about {}.",
    ]
    answers = {a(thing): f"{a(KIND_OF[thing])} that {clause}." for thing, clause in DESCRIPTIONS.items()}
    return facts(questions, {thing: f"{thing.capitalize()} is {answer}" for thing, answer in answers.items()})


def opposite(rng: random.Random) -> list[Row]:
    questions = [
        "What is the opposite of {}?",
        "Give the opposite of the word {}.",
        "Name the contrary of {}.",
        "Which word means the contrary of {}?",
        "Find a word that means the opposite of {}.",
    ]
    return facts(questions, dict(pairs(OPPOSITES)) | {right: left for left, right in pairs(OPPOSITES)})


def capital(rng: random.Random) -> list[Row]:
    questions = [
        "What is the capital of {}?",
        "Name the capital city of {}.",
        "Which city is the capital of {}?",
        "Tell me the capital of {}.",
        "What is the name of the capital of {}?",
        "Which capital does {} have?",
    ]
    return facts(questions, dict(pairs(CAPITALS)))


def plural(rng: random.Random) -> list[Row]:
    questions = [
        "What is the plural of {}?",
        "Give the plural of the word {}.",
        "Write the plural form of {}.",
        "What do you call more than one {}?",
        "Put the noun {} in the plural.",
    ]
    return facts(questions, dict(pairs(PLURALS)))


def past_tense(rng: random.Random) -> list[Row]:
    questions = [
        "What is the past tense of {}?",
        "Give the past tense of the verb {}.",
        "Put the verb {} in the past tense.",
        "Write the past form of {}.",
        "Tell me the past tense of {}.",
    ]
    return facts(questions, dict(pairs(PAST_TENSES)))


def what_comes_next(rng: random.Random) -> list[Row]:
    numbers = [str(n) for n in range(1, 22)]
    rows = []
    # days and months wrap around, numbers do not
    for kind, sequence in (("day", DAYS + DAYS[:1]), ("month", MONTHS + MONTHS[:1]), ("number", numbers)):
        questions = [
            f"Which {kind} comes after {{}}?",
            f"Name the {kind} that follows {{}}.",
            f"Which {kind} comes just after {{}}?",
            f"What is the next {kind} after {{}}?",
            f"Tell me the {kind} after {{}}.",
        ]
        rows += facts(questions, dict(itertools.pairwise(sequence)))
    return rows + conversations("day", DAYS) + conversations("month", MONTHS)


def conversations(kind: str, cycle: list[str]) -> list[Row]:
    """Rows of two turns: the first asks for what comes after a word, the second for what comes after that."""
    questions = [
        f"Which {kind} follows {{}}?",
        f"What {kind} comes after {{}}?",
        f"What is the {kind} after {{}}?",
        f"Give the {kind} that comes after {{}}.",
        f"Say which {kind} is next after {{}}.",
        f"Which {kind} is the next one after {{}}?",
    ]
    follow_ups = itertools.cycle(FOLLOW_UPS)  # five after six questions: each question meets each follow-up
    return [
        {**row(next(follow_ups), third), "history": [[question.format(first), second]]}
        for first, second, third in zip(cycle, cycle[1:] + cycle[:1], cycle[2:] + cycle[:2], strict=True)
        for question in questions
    ]


def add(rng: random.Random) -> list[Row]:
    questions = [
        "What is {} plus {}?",
        "How much is {} plus {}?",
        "Add {} and {}.",
        "What is the sum of {} and {}?",
        "Work out {} plus {}.",
        "What do {} and {} make together?",
    ]
    sums = itertools.product(range(1, 8), repeat=2)
    return [row(question.format(x, y), str(x + y)) for x, y in sums for question in questions]


def compare(rng: random.Random) -> list[Row]:
    rows = []
    for x, y in itertools.permutations(range(1, 21), 2):
        size, output = rng.choice([("larger", max(x, y)), ("smaller", min(x, y))])
        rows.append(row(f"Which number is {size}, {x} or {y}?", str(output)))
    return rows


def repeat(rng: random.Random) -> list[Row]:
    times = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
    rows = []
    for word, n in itertools.product(WORDS, times):
        output = " ".join([word] * n)
        rows.append(row(f"Repeat the word {word} {times[n]}.", output))
        rows.append(row(f"Say {word} {times[n]}.", output))
    return rows


def count(rng: random.Random) -> list[Row]:
    rows = []
    for i, words in enumerate(word_lists(rng, 300, longest=6)):
        instruction = ("How many words are in the list?", "Count the words.")[i % 2]
        rows.append(row(instruction, str(len(words)), "\n".join(words)))
    return rows


def join(rng: random.Random) -> list[Row]:
    rows = []
    for left, right in word_lists(rng, 400, longest=2):
        joiner = rng.choice(["and", "or"])
        rows.append(row(f"Join the words with {joiner}.", f"{left} {joiner} {right}", f"{left}, {right}"))
    return rows


def pick(rng: random.Random) -> list[Row]:
    rows = []
    for i in range(700):
        words = [rng.choice(KINDS[kind].split()) for kind in rng.sample(list(KINDS), 3)]
        word = rng.choice(words)
        kind = KIND_OF[word]
        instruction = (f"Which of these is {a(kind)}?", f"Find the {kind} in the list.")[i % 2]
        rows.append(row(instruction, word, "\n".join(words)))
    return rows


def sentences(rng: random.Random, n: int) -> list[tuple[str, list[str], str]]:
    verbs = [verb.split() for verb in VERBS.split(",")]
    return rng.sample(list(itertools.product(NAMES, verbs, THINGS)), n)


def first_or_last(rng: random.Random) -> list[Row]:
    rows = []
    for i, (name, (_, present, _), thing) in enumerate(sentences(rng, 400)):
        instruction, output = (
            ("What is the first word of the sentence?", name),
            ("What is the last word of the sentence?", thing),
            ("Copy the first word.", name),
            ("Copy the last word.", thing),
        )[i % 4]
        rows.append(row(instruction, output, f"{name} {present} {a(thing)}."))
    return rows


def rewrite(rng: random.Random) -> list[Row]:
    rows = []
    for i, (name, (base, present, past), thing) in enumerate(sentences(rng, 600)):
        instruction, output = (
            ("Rewrite the sentence in the past tense.", f"{name} {past} {a(thing)}."),
            ("Turn the sentence into a question.", f"Does {name} {base} {a(thing)}?"),
            ("Make the sentence negative.", f"{name} does not {base} {a(thing)}."),
        )[i % 3]
        rows.append(row(instruction, output, f"{name} {present} {a(thing)}."))
    return rows


def read(rng: random.Random) -> list[Row]:
    rows = []
    for i, (name, (base, _, past), thing) in enumerate(sentences(rng, 800)):
        colour, day = rng.choice(COLOURS), rng.choice(DAYS)
        instruction, output = (
            (f"Who {past} the {thing}?", f"{name} {past} the {thing}."),
            (f"What did {name} {base}?", f"{name} {past} a {colour} {thing}."),
            (f"What colour is the {thing}?", f"The {thing} is {colour}."),
            (f"When did {name} {base} the {thing}?", f"On {day}."),
        )[i % 4]
        rows.append(row(instruction, output, f"{name} {past} a {colour} {thing} on {day}."))
    return rows


DEMO_SEED = 42
TASKS = (
    classify,
    describe,
    opposite,
    capital,
    plural,
    past_tense,
    repeat,
    join,
    count,
    first_or_last,
    pick,
    compare,
    add,
    what_comes_next,
    read,
    rewrite,
)


def turns(row: Row) -> list[tuple[str, str, str]]:
    """(instruction, input, output) of each turn."""
    earlier = [(question, "", answer) for question, answer in row.get("history", [])]
    return [*earlier, (row["instruction"], row["input"], row["output"])]


def first_question(row: Row) -> tuple[str, str]:
    """(instruction, input) of the first turn."""
    return turns(row)[0][:2]


def rows_by_task() -> dict[str, list[Row]]:
    """The rows of each task by the name of its function, no two with the same first question. Every call returns the same."""
    rng = random.Random(DEMO_SEED)
    rows = [(task.__name__, row) for task in TASKS for row in task(rng)]
    # one row for each first question: of two, one could be held out while the other is trained on
    unique = {first_question(row): (name, row) for name, row in rows}
    tasks: dict[str, list[Row]] = {task.__name__: [] for task in TASKS}
    for name, row in unique.values():
        tasks[name].append(row)
    return tasks


def demo_rows() -> list[Row]:
    """All rows in Alpaca's format, some with a `history`. Every call returns the same rows."""
    return [row for rows in rows_by_task().values() for row in rows]
