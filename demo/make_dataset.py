"""Makes the demo's dataset: how two words of a sentence are related, over hierarchies and cycles.

Four classes: `hierarchy` (one is a kind of the other), `siblings` (two of the same kind), `cycle` (two stations of the
same cycle, such as two months) and `unrelated`. The sentences say nothing about the relation, so the class depends on
what the words mean. Training and test share no sentence frame and, but for the names of the categories, no word of a
hierarchy; of the days, months, hours and directions, which are few, the test holds pairs that training does not, and
its other cycles are new altogether.

    python demo/make_dataset.py        # writes train.tsv and test.tsv beside this file, always the same
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

CLASSES = ("hierarchy", "siblings", "cycle", "unrelated")
ROWS_PER_CLASS = {"train": 390, "test": 130}
HELD_OUT_ONE_IN = 4
"""Of the cycles that training and test share, about one pair in four is in the test alone."""

TEST_MEMBERS = 3
"""Of each category without categories of its own, the last members are in the test alone."""

TAXONOMY = """
    animal > bird fish insect reptile mammal
    bird > sparrow eagle owl robin swan pigeon parrot falcon
    fish > trout salmon shark herring cod tuna carp pike
    insect > ant beetle wasp butterfly mosquito moth cockroach bee
    reptile > lizard tortoise crocodile cobra gecko viper iguana
    mammal > horse whale elephant otter rabbit goat tiger squirrel
    plant > tree flower herb
    tree > oak pine birch maple willow cedar elm beech
    flower > rose tulip daisy lily orchid violet poppy
    herb > basil thyme parsley mint rosemary sage
    food > fruit vegetable cheese bread
    fruit > apple banana cherry peach mango pear grape plum
    vegetable > carrot onion cabbage spinach turnip leek radish
    cheese > cheddar brie gouda parmesan mozzarella feta
    bread > baguette bagel pretzel brioche ciabatta
    drink > tea coffee juice lemonade wine beer
    clothing > hat shoe coat
    hat > beret helmet bonnet fedora turban
    shoe > boot sandal slipper clog sneaker
    coat > parka raincoat anorak poncho cloak
    vehicle > boat car aircraft
    boat > canoe ferry yacht raft kayak
    car > limousine taxi convertible hatchback jeep
    aircraft > helicopter glider biplane airship jet
    tool > hammer saw chisel wrench pliers screwdriver drill
    weapon > sword dagger rifle spear cannon pistol
    instrument > piano violin trumpet flute drum harp clarinet guitar
    furniture > table wardrobe sofa shelf desk chair
    building > castle cottage church hospital barn skyscraper
    language > French Spanish Japanese Arabic Hindi Dutch
    science > physics chemistry biology geology astronomy botany
    emotion > anger joy sadness fear disgust envy
    metal > iron copper gold tin aluminium nickel
    gemstone > diamond ruby emerald sapphire topaz opal
    sport > tennis hockey rugby swimming boxing football
    dance > waltz tango polka salsa ballet samba
    profession > lawyer plumber teacher baker surgeon carpenter
    fabric > silk wool cotton linen velvet denim
    shape > triangle circle square hexagon oval cube
    disease > malaria measles influenza cholera pneumonia tuberculosis
    """

SHARED_CYCLES = {
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "month": [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ],
    "hour": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
    "direction": ["north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest"],
}
TEST_CYCLES = {
    "season": ["spring", "summer", "autumn", "winter"],
    "time of day": ["dawn", "morning", "noon", "afternoon", "dusk", "night"],
    "moon": [
        "new moon",
        "waxing crescent",
        "first quarter",
        "waxing gibbous",
        "full moon",
        "waning gibbous",
        "last quarter",
        "waning crescent",
    ],
}
FRAMES = {
    "train": (
        "Think of {a}, and then of {b}.",
        "What does {a} have to do with {b}?",
        "She wrote {a} on the board, and {b} next to it.",
        "The first card said {a}; the second card said {b}.",
        "Compare {a} with {b}.",
        "Tell me how {a} is related to {b}.",
        "He pointed at {a} and asked about {b}.",
        "From {a} we went on to {b}.",
        "Between {a} and {b} there may be a link.",
        "The quiz paired {a} with {b}.",
        "My list has {a} on the left and {b} on the right.",
        "In the puzzle, {a} stood over {b}.",
    ),
    "test": (
        "The lesson named {a} and afterwards {b}.",
        "How would you connect {a} to {b}?",
        "Two entries in the glossary are {a} and {b}.",
        "Somebody mentioned {a}, and somebody else {b}.",
        "Consider {a} alongside {b}.",
    ),
}

Pair = tuple[str, str]


def make(split: str) -> list[Pair]:
    """The (label, sentence) rows of "train" or "test", as many of each class, in a fixed shuffled order."""
    rows = []
    for label in CLASSES:
        pairs = related_pairs(split)[label]
        # every pair once before any is used twice, each time in another frame
        turns = [shuffled(pairs, f"{split}/{label}/{turn}") for turn in range(len(FRAMES[split]))]
        frames = {pair: shuffled(FRAMES[split], f"{split}/{pair}") for pair in pairs}
        sentences = [
            frames[pair][turn].format(a=pair[0], b=pair[1]) for turn, turned in enumerate(turns) for pair in turned
        ]
        if len(sentences) < ROWS_PER_CLASS[split]:
            raise ValueError(
                f"{split}, {label!r}: {len(sentences)} sentences can be made, and {ROWS_PER_CLASS[split]} are wanted"
            )
        rows += [(label, sentence) for sentence in sentences[: ROWS_PER_CLASS[split]]]
    return shuffled(rows, split)


def related_pairs(split: str) -> dict[str, list[Pair]]:
    """The pairs of words of each class, each pair in one order."""
    tree = taxonomy(split)
    kind_of = [(member, category) for category, members in tree.items() for member in members if member not in tree]
    kind_of += [(leaf, top) for top, middle in tree.items() for name in middle for leaf in tree.get(name, ())]
    siblings = [pair for members in tree.values() for pair in itertools.combinations(members, 2) if pair[0] not in tree]
    wanted = ROWS_PER_CLASS[split] // 3  # unrelated: with a category, with a station of a cycle, with neither
    words = sorted({word for members in tree.values() for word in members} | set(tree))
    strangers = shuffled([p for p in itertools.combinations(words, 2) if not _kin(*p, tree)], f"{split}/strangers")
    with_category = [pair for pair in strangers if (pair[0] in tree) != (pair[1] in tree)]
    with_none = [pair for pair in strangers if pair[0] not in tree and pair[1] not in tree]
    cycles = {**SHARED_CYCLES, **(TEST_CYCLES if split == "test" else {})}
    stations = [(station, name) for name, cycle in cycles.items() for station in cycle]
    of_two_cycles = [(a, b) for (a, first), (b, second) in itertools.combinations(stations, 2) if first != second]
    with_station = [(station, word) for station, _ in stations for word in words]
    half = wanted // 2
    unrelated = with_category[:wanted] + with_none[: wanted + 2]
    unrelated += shuffled(of_two_cycles, split)[:half] + shuffled(with_station, split)[: wanted - half + 2]
    pairs = {"hierarchy": kind_of, "siblings": siblings, "cycle": cycle_pairs(split), "unrelated": unrelated}
    return {label: [_ordered(pair, split) for pair in found] for label, found in pairs.items()}


def _ordered(pair: Pair, split: str) -> Pair:
    return pair if _digest(split, pair) % 2 else pair[::-1]


def taxonomy(split: str) -> dict[str, list[str]]:
    """{category: members} of one split; a member may be a category of its own, and then is in both splits."""
    lines = (line.split(" > ") for line in TAXONOMY.strip().splitlines())
    tree = {category.strip(): members.split() for category, members in lines}
    kept = slice(-TEST_MEMBERS, None) if split == "test" else slice(None, -TEST_MEMBERS)
    return {category: members if members[0] in tree else members[kept] for category, members in tree.items()}


def cycle_pairs(split: str) -> list[Pair]:
    """Two stations of the same cycle. Training and test have no pair in common."""
    shared = [pair for cycle in SHARED_CYCLES.values() for pair in itertools.combinations(cycle, 2)]
    held_out = [pair for pair in shared if _digest("held out", pair) % HELD_OUT_ONE_IN == 0]
    if split == "train":
        return [pair for pair in shared if pair not in held_out]
    return held_out + [pair for cycle in TEST_CYCLES.values() for pair in itertools.combinations(cycle, 2)]


def _kin(a: str, b: str, tree: dict[str, list[str]]) -> bool:
    """Whether two words hang under a common word, or one under the other."""

    def above(word: str) -> set[str]:
        parents = {category for category, members in tree.items() if word in members}
        return {word} | parents.union(*(above(parent) for parent in parents))

    return bool(above(a) & above(b))


def shuffled(items: Iterable, key: str) -> list:
    """The items in an order that depends on them and on `key` alone, in every version of Python."""
    return sorted(items, key=lambda item: _digest(key, item))


def _digest(key: str, item) -> int:
    return int.from_bytes(hashlib.sha256(f"{key}|{item}".encode()).digest()[:8], "big")


def as_tsv(rows: Iterable[Pair]) -> str:
    """The file's text: a header row, and a label and a sentence on each line."""
    return "label\tsentence\n" + "".join(f"{label}\t{sentence}\n" for label, sentence in rows)


if __name__ == "__main__":
    for name in ROWS_PER_CLASS:
        path = Path(__file__).with_name(f"{name}.tsv")
        path.write_text(as_tsv(make(name)))
        print(path)
