"""The phrasings of the world: captions are written with these forms and prompts are read with them."""

PREFIXES = (
    "a photo of", "a picture of", "a drawing of", "an illustration of", "there is", "this is", "",
)  # fmt: skip
"""What a caption may begin with; the first is the one that prompts of benchmarks use."""

PAIR_FORMS = ("{} and {}", "{} next to {}", "{} beside {}", "{} together with {}", "both {} and {}")

RELATION_FORMS: dict[str, tuple[str, ...]] = {
    "left of": ("{} left of {}", "{} to the left of {}", "{} on the left of {}", "{} with {} to its right"),
    "right of": (
        "{} right of {}",
        "{} to the right of {}",
        "{} on the right of {}",
        "{} with {} to its left",
    ),
    "above": ("{} above {}", "{} over {}", "{} on top of {}", "{} with {} below it"),
    "below": ("{} below {}", "{} under {}", "{} beneath {}", "{} with {} above it"),
}
"""Of the first object to the second."""

COUNT_FORMS = ("{} {}", "exactly {} {}", "a group of {} {}", "a total of {} {}", "{} {} together")
ONE_FORMS = ("one {}", "exactly one {}", "a single {}", "just one {}", "only one {}")

HYBRID_FORMS = (
    "a mix of {} and {}", "a cross between {} and {}", "a hybrid of {} and {}", "{} mixed with {}",
    "{} merged with {}", "half {} and half {}",
)  # fmt: skip
EXCHANGE_FORMS = ("{} with the {} of {}", "{} that has the {} of {}", "{} wearing the {} of {}")
OVERLAY_FORMS = (
    "{} with a sticker of {} on it", "{} with {} pasted over it", "{} carrying a picture of {}",
    "{} covered by a sticker of {}", "{} with a small {} stuck on it",
)  # fmt: skip

CLAUSES: dict[str, str] = {
    "colour": "that is {}",
    "pattern": "that is {}",
    "size": "that is {}",
    "mood": "that looks {}",
}
"""How an adjective may follow its noun."""

NEAREST: dict[str, tuple[str, ...]] = {
    "dog": ("cat", "lion"), "puppy": ("cat", "rabbit"), "wolf": ("lion", "cat"), "fox": ("cat", "rabbit"),
    "bear": ("lion", "elephant"), "tiger": ("lion", "cat"), "horse": ("elephant", "lion"), "cow": ("pig", "elephant"),
    "sheep": ("rabbit", "pig"), "goat": ("pig", "rabbit"), "mouse": ("rabbit", "cat"), "hamster": ("rabbit", "pig"),
    "panda": ("penguin", "cat"), "monkey": ("cat", "lion"), "giraffe": ("elephant", "lion"),
    "zebra": ("elephant", "lion"),
    "bird": ("owl", "penguin", "peacock"), "duck": ("penguin", "owl"), "chicken": ("peacock", "owl"),
    "parrot": ("peacock", "owl"), "eagle": ("owl", "peacock"), "swan": ("penguin", "peacock"),
    "bat": ("owl", "butterfly"),
    "snake": ("snail", "turtle"), "lizard": ("frog", "turtle"), "dinosaur": ("turtle", "elephant"),
    "dragon": ("lion", "peacock", "butterfly"), "unicorn": ("elephant", "lion"), "monster": ("octopus", "crab"),
    "shark": ("fish", "octopus"), "whale": ("fish", "elephant"), "dolphin": ("fish", "penguin"), "squid": ("octopus",),
    "lobster": ("crab",), "shrimp": ("crab", "fish"), "jellyfish": ("octopus", "mushroom"), "spider": ("crab", "bee"),
    "ant": ("bee", "crab"), "fly": ("bee", "butterfly"), "moth": ("butterfly", "bee"), "insect": ("bee", "butterfly"),
    "worm": ("snail",), "person": ("robot", "penguin"), "man": ("robot",), "woman": ("robot",), "girl": ("robot",),
    "boy": ("robot",), "child": ("robot", "rabbit"), "human": ("robot",), "face": ("robot", "clock"),
    "bottle": ("cup", "teapot"), "glass": ("cup",), "bowl": ("cup", "teapot"), "kettle": ("teapot", "cup"),
    "coffee": ("cup",), "tea": ("teapot", "cup"), "plate": ("cup",), "castle": ("house", "windmill"),
    "tower": ("windmill", "rocket"), "church": ("house", "windmill"), "building": ("house", "windmill"),
    "truck": ("car",), "bus": ("car",), "train": ("car", "boat"), "bicycle": ("car",), "motorcycle": ("car",),
    "plane": ("rocket",), "airplane": ("rocket",), "helicopter": ("windmill", "rocket"), "ship": ("boat",),
    "flower": ("sunflower",), "rose": ("sunflower",), "tulip": ("sunflower", "windmill"), "plant": ("cactus", "tree"),
    "bush": ("tree", "cactus"), "forest": ("tree",), "apple": ("pineapple", "tree"), "banana": ("pineapple",),
    "fruit": ("pineapple",),  "cake": ("mushroom", "cup"), "pumpkin": ("pineapple",),
    "violin": ("guitar",), "piano": ("guitar",), "drum": ("guitar",), "watch": ("clock",), "phone": ("robot", "clock"),
    "computer": ("robot",), "television": ("robot",), "candle": ("lamp",), "lantern": ("lamp",), "light": ("lamp",),
    "chair": ("lamp", "house"), "table": ("lamp", "house"), "umbrella": ("mushroom", "lamp"), "ball": ("clock",),
    "white": ("a natural colour: leave it out",), "black": ("purple", "brown"), "grey": ("brown", "blue"),
    "gray": ("brown", "blue"), "gold": ("yellow", "orange"), "silver": ("blue",),
    "violet": ("purple",),  "mountain": ("snow", "grass"), "desert": ("beach",), "space": ("night",),
    "ocean": ("beach",), "lake": ("beach",), "garden": ("grass",), "room": ("plain",), "park": ("grass",),
    "sad": ("sleepy", "angry"), "big": ("huge",), "large": ("huge",), "small": ("tiny",), "little": ("tiny",),
    "crown": ("hat",), "cap": ("hat",), "coat": ("scarf",), "umbrellas": ("mushrooms",),
}  # fmt: skip
"""Words that people type and the world does not know, with known ones that are near in meaning."""
