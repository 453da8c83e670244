"""Every name that the toy world knows, from kinds and their parts to colours, moods and relations."""

from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Palette:
    """The two colours an object is painted with: its main colour, and that of its belly, trim or pattern."""

    primary: RGB
    secondary: RGB


ANIMALS = (
    "owl", "snail", "frog", "cat", "fish", "turtle", "bee", "pig", "rabbit", "penguin", "butterfly", "crab",
    "lion", "elephant", "octopus", "peacock",
)  # fmt: skip
THINGS = (
    "mushroom", "house", "car", "cup", "tree", "pineapple", "teapot", "guitar", "rocket", "cactus", "lamp", "boat",
    "robot", "windmill", "sunflower", "clock",
)  # fmt: skip
KINDS = ANIMALS + THINGS

SLOTS = ("head", "body", "base", "extra")
"""The parts that every kind is drawn from, on one body plan; `drawing/` has one file for each."""

NAMES: dict[str, tuple[str, ...]] = {kind: (kind,) for kind in KINDS} | {
    "owl": ("owl", "bird of the night"),
    "frog": ("frog", "toad"),
    "cat": ("cat", "kitten"),
    "fish": ("fish", "goldfish"),
    "turtle": ("turtle", "tortoise"),
    "bee": ("bee", "bumblebee"),
    "pig": ("pig", "piglet"),
    "rabbit": ("rabbit", "bunny"),
    "lion": ("lion", "king of beasts"),
    "mushroom": ("mushroom", "toadstool"),
    "house": ("house", "cottage"),
    "car": ("car", "automobile"),
    "cup": ("cup", "mug"),
    "tree": ("tree", "oak"),
    "rocket": ("rocket", "spaceship"),
    "boat": ("boat", "sailboat"),
    "robot": ("robot", "android"),
    "windmill": ("windmill", "mill"),
    "clock": ("clock", "alarm clock"),
}
"""What a kind is called; the first name is the one that metadata uses."""

_IRREGULAR = {
    "fish": "fish", "goldfish": "goldfish", "butterfly": "butterflies", "cactus": "cacti", "bunny": "bunnies",
    "bird of the night": "birds of the night", "king of beasts": "kings of beasts", "octopus": "octopuses",
}  # fmt: skip
PLURALS: dict[str, str] = {
    name: _IRREGULAR.get(name, f"{name}s") for names in NAMES.values() for name in names
}

PART_WORDS: dict[str, tuple[str, str, str, str]] = {
    "owl": ("head", "feathers", "talons", "wings"),
    "snail": ("eyestalks", "body", "foot", "shell"),
    "frog": ("head", "belly", "legs", "hands"),
    "cat": ("head", "body", "paws", "tail"),
    "fish": ("head", "scales", "tail fin", "fins"),
    "turtle": ("head", "belly", "legs", "shell"),
    "bee": ("head", "stripes", "stinger", "wings"),
    "pig": ("head", "belly", "trotters", "curly tail"),
    "rabbit": ("ears", "body", "feet", "cotton tail"),
    "penguin": ("head", "belly", "feet", "flippers"),
    "butterfly": ("antennae", "body", "flower", "wings"),
    "crab": ("eyes", "carapace", "legs", "claws"),
    "lion": ("mane", "body", "paws", "tail"),
    "elephant": ("trunk", "blanket", "legs", "tail"),
    "octopus": ("head", "mantle", "tentacles", "arms"),
    "peacock": ("crest", "breast", "legs", "fan"),
    "mushroom": ("cap", "stem", "grass", "little mushroom"),
    "house": ("roof", "walls", "steps", "chimney"),
    "car": ("windscreen", "headlights", "wheels", "spoiler"),
    "cup": ("steam", "bowl", "saucer", "handle"),
    "tree": ("crown", "trunk", "roots", "branches"),
    "pineapple": ("leaves", "fruit", "slice", "side leaves"),
    "teapot": ("lid", "belly", "pedestal", "spout"),
    "guitar": ("neck", "sound hole", "bridge", "strap"),
    "rocket": ("nose", "hull", "flames", "fins"),
    "cactus": ("flower", "spines", "pot", "arms"),
    "lamp": ("shade", "vase", "stand", "cord"),
    "boat": ("mast", "hull", "waves", "sails"),
    "robot": ("screen", "buttons", "treads", "grippers"),
    "windmill": ("cap", "tower", "hill", "blades"),
    "sunflower": ("petals", "stem", "soil", "leaves"),
    "clock": ("bells", "dial", "feet", "key"),
}
"""What the part of a kind in each slot is called: "an owl with the shell of a snail"."""

COLOURS: dict[str, Palette] = {
    "red": Palette((222, 50, 48), (255, 200, 188)),
    "orange": Palette((248, 138, 28), (255, 224, 176)),
    "yellow": Palette((252, 214, 48), (255, 246, 200)),
    "green": Palette((52, 160, 76), (198, 234, 182)),
    "blue": Palette((44, 104, 220), (190, 216, 255)),
    "purple": Palette((128, 62, 184), (222, 198, 246)),
    "pink": Palette((248, 132, 186), (255, 222, 236)),
    "brown": Palette((126, 80, 46), (224, 194, 156)),
}

NATURAL: dict[str, Palette] = {
    "owl": Palette((158, 112, 74), (240, 218, 178)),
    "snail": Palette((232, 190, 140), (196, 112, 62)),
    "frog": Palette((112, 190, 74), (226, 240, 168)),
    "cat": Palette((156, 158, 170), (242, 238, 236)),
    "fish": Palette((246, 134, 48), (255, 226, 180)),
    "turtle": Palette((132, 186, 98), (222, 214, 134)),
    "bee": Palette((250, 200, 46), (62, 52, 60)),
    "pig": Palette((246, 172, 180), (255, 208, 212)),
    "rabbit": Palette((226, 214, 202), (255, 250, 244)),
    "penguin": Palette((62, 70, 94), (250, 250, 248)),
    "butterfly": Palette((82, 138, 220), (254, 206, 92)),
    "crab": Palette((232, 84, 56), (255, 196, 158)),
    "lion": Palette((240, 184, 92), (168, 98, 46)),
    "elephant": Palette((150, 166, 188), (208, 62, 84)),
    "octopus": Palette((176, 98, 190), (242, 190, 226)),
    "peacock": Palette((30, 118, 176), (72, 190, 168)),
    "mushroom": Palette((216, 54, 54), (252, 242, 224)),
    "house": Palette((244, 222, 178), (190, 84, 66)),
    "car": Palette((62, 142, 206), (236, 240, 244)),
    "cup": Palette((240, 242, 246), (108, 156, 214)),
    "tree": Palette((84, 162, 78), (146, 98, 60)),
    "pineapple": Palette((246, 192, 58), (80, 158, 76)),
    "teapot": Palette((104, 170, 194), (244, 238, 222)),
    "guitar": Palette((208, 130, 60), (110, 70, 50)),
    "rocket": Palette((234, 238, 244), (226, 70, 66)),
    "cactus": Palette((82, 164, 92), (214, 118, 76)),
    "lamp": Palette((252, 222, 130), (124, 156, 172)),
    "boat": Palette((178, 94, 58), (252, 246, 234)),
    "robot": Palette((172, 184, 196), (82, 204, 206)),
    "windmill": Palette((240, 228, 206), (196, 92, 72)),
    "sunflower": Palette((252, 200, 40), (102, 164, 70)),
    "clock": Palette((232, 96, 92), (252, 248, 238)),
}

PATTERNS = ("plain", "dots", "stripes")
PATTERN_WORDS = {"dots": ("dotted", "spotted"), "stripes": ("striped",)}

MOODS = ("happy", "sleepy", "angry")
MOOD_WORDS: dict[str, tuple[str, ...]] = {
    "happy": ("happy", "smiling"),
    "sleepy": ("sleepy", "tired"),
    "angry": ("angry", "grumpy"),
}
"""Moods show on the faces of animals; things have no face."""

SIZES = ("tiny", "huge")
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "tiny": ("tiny", "very small"),
    "huge": ("huge", "giant"),
}

MARKS = ("star", "heart", "moon", "letter", "scar", "socks", "half")
"""What only a subject's reference shows: a sign on its chest, odd socks, or a head of two colours."""
LETTERS = "AKMRXZ"

ACCESSORIES = ("hat", "scarf", "glasses", "balloon")
ACCESSORY_PHRASES: dict[str, tuple[str, ...]] = {
    "hat": ("wearing a hat", "with a hat", "with a top hat on"),
    "scarf": ("wearing a scarf", "with a scarf", "with a scarf around it"),
    "glasses": ("wearing glasses", "with glasses", "with sunglasses on"),
    "balloon": ("holding a balloon", "with a balloon", "with a balloon in hand"),
}

BACKGROUNDS = ("plain", "grass", "beach", "snow", "night", "city")
BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "plain": ("on a plain background", "in front of a plain wall"),
    "grass": ("on the grass", "on a meadow"),
    "beach": ("on the beach", "by the sea"),
    "snow": ("in the snow", "in winter"),
    "night": ("at night", "under the stars"),
    "city": ("in the city", "on a street in town"),
}

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
