"""This module lists the toy world's names: kinds, colours, patterns, accessories, backgrounds and relations."""

from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Palette:
    """A palette holds the two colours an object is painted with: the body's, and that of belly, trim or pattern."""

    primary: RGB
    secondary: RGB


ANIMALS = (
    "owl", "snail", "frog", "cat", "fish", "turtle", "bee", "pig", "rabbit", "penguin", "butterfly", "crab",
)  # fmt: skip
THINGS = (
    "mushroom", "house", "car", "cup", "tree", "pineapple",
    "teapot", "guitar", "rocket", "cactus", "lamp", "boat",
)  # fmt: skip
KINDS = ANIMALS + THINGS

PLURALS = {kind: f"{kind}s" for kind in KINDS} | {
    "fish": "fish",
    "butterfly": "butterflies",
    "cactus": "cacti",
}

COLOURS: dict[str, Palette] = {
    "red": Palette((218, 34, 40), (255, 190, 180)),
    "orange": Palette((250, 132, 16), (255, 222, 180)),
    "yellow": Palette((252, 218, 40), (255, 247, 205)),
    "green": Palette((38, 152, 62), (190, 232, 180)),
    "blue": Palette((36, 92, 222), (186, 214, 255)),
    "purple": Palette((122, 48, 176), (220, 192, 245)),
    "pink": Palette((252, 132, 190), (255, 222, 236)),
    "brown": Palette((116, 70, 36), (222, 190, 150)),
}

NATURAL: dict[str, Palette] = {
    "owl": Palette((150, 104, 66), (238, 214, 172)),
    "snail": Palette((196, 116, 62), (240, 214, 150)),
    "frog": Palette((104, 190, 66), (222, 240, 160)),
    "cat": Palette((150, 152, 162), (240, 236, 236)),
    "fish": Palette((246, 128, 40), (255, 232, 196)),
    "turtle": Palette((74, 128, 70), (172, 206, 118)),
    "bee": Palette((250, 198, 36), (255, 240, 190)),
    "pig": Palette((248, 170, 176), (255, 206, 208)),
    "rabbit": Palette((226, 214, 200), (255, 250, 244)),
    "penguin": Palette((58, 64, 84), (248, 248, 246)),
    "butterfly": Palette((74, 134, 214), (252, 214, 96)),
    "crab": Palette((226, 72, 46), (255, 196, 160)),
    "mushroom": Palette((212, 44, 44), (250, 240, 222)),
    "house": Palette((240, 220, 178), (186, 76, 58)),
    "car": Palette((210, 52, 56), (232, 236, 240)),
    "cup": Palette((238, 240, 244), (96, 144, 206)),
    "tree": Palette((70, 150, 66), (186, 222, 130)),
    "pineapple": Palette((246, 190, 50), (196, 128, 30)),
    "teapot": Palette((92, 156, 190), (238, 240, 226)),
    "guitar": Palette((200, 124, 54), (244, 206, 140)),
    "rocket": Palette((232, 236, 242), (220, 60, 56)),
    "cactus": Palette((72, 156, 84), (196, 226, 150)),
    "lamp": Palette((250, 226, 140), (255, 248, 214)),
    "boat": Palette((166, 84, 50), (250, 246, 236)),
}

PATTERNS = ("plain", "dots", "stripes")
PATTERN_WORDS = {"dots": "dotted", "stripes": "striped"}

ACCESSORIES = ("hat", "scarf", "glasses", "balloon")
ACCESSORY_PHRASES: dict[str, tuple[str, ...]] = {
    "hat": ("wearing a hat", "with a hat"),
    "scarf": ("wearing a scarf", "with a scarf"),
    "glasses": ("wearing glasses", "with glasses"),
    "balloon": ("with a balloon", "holding a balloon"),
}

BACKGROUNDS = ("plain", "grass", "beach", "snow", "night", "city")
BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "plain": ("on a plain background",),
    "grass": ("on the grass", "on grass"),
    "beach": ("on the beach", "at the beach"),
    "snow": ("in the snow",),
    "night": ("at night",),
    "city": ("in the city",),
}

RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
