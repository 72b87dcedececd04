"""The world of the second embedded model: signs with a word on them, for the OCR reward.

`a sign that says "RIVER"`: one of a closed list of words of three to five letters, drawn in dark capitals on a light
plate, letters of one width and on the lattice of the scenes. A fifth of the words (by a hash) is *held out*: never
rendered for training. The training also shows letters in any order, or a model learns a few words and not to spell.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from densegrpo_fast.embedded.scenes import IMAGE_SIZE, background

WORDS = (
    "ART BAR BUS CAB CAFE CAR CAT CITY CLUB COAT COLD CORN CREW CUP DANCE DATE DAY DOG DOOR DREAM DRINK EAST EXIT "
    "FARM FILM FIRE FISH FLAT FOOD FOX FREE FRESH FRUIT GAME GATE GIFT GLASS GOLD GRAND GREEN HALL HAT HEART HELP "
    "HILL HOME HORSE HOT HOTEL HOUSE ICE INN JAZZ JUICE KEY KING LAKE LAMP LEFT LIGHT LION LUCK MAP METAL MILK "
    "MOON MUSIC NEWS NIGHT NORTH OAK OCEAN OPEN PARK PAN PEACE PIANO PIZZA PLAY POOL POST QUEEN RAIN RED RIVER "
    "ROAD ROCK ROOM SALE SALT SEA SHOP SKY SNOW SONG SOUP SOUTH STAR STOP STORE SUN TAXI TEA TIGER TOWN TRAIN "
    "TREE WATER WEST WINE WOOD WORLD YES ZOO"
).split()
"""The closed list."""

LETTER_WIDTH, LETTER_HEIGHT = 12, 20
"""The cell of a letter in pixels."""
_SPELLINGS = 6_000
_WORD_SHARE = 0.25
_HELD_OUT_EVERY = 5
_FINE = 8


def prompt(word: str) -> str:
    """The sentence that asks for a word."""
    return f'a sign that says "{word}"'


def split(held_out: bool) -> list[str]:
    """The words that are held out (or are not)."""
    return [w for w in WORDS if (hashlib.sha256(w.encode()).digest()[0] % _HELD_OUT_EVERY == 0) == held_out]


@lru_cache
def training_words() -> tuple[str, ...]:
    """What the pretraining draws: the words that are not held out, then letters in any order, none of them a word."""
    generator = np.random.default_rng(7)
    found = dict.fromkeys(split(held_out=False))
    while len(found) < len(split(held_out=False)) + _SPELLINGS:
        letters = generator.integers(0, 26, generator.integers(3, 6))
        spelt = "".join(chr(ord("A") + letter) for letter in letters)
        if spelt not in WORDS:
            found[spelt] = None
    return tuple(found)


def sample_words(count: int, generator: np.random.Generator) -> list[str]:
    """Of `training_words`; a quarter are words."""
    known, every = len(split(held_out=False)), training_words()
    real = generator.random(count) < _WORD_SHARE
    return [every[generator.integers(known) if word else generator.integers(known, len(every))] for word in real]


def render(word: str, generator: np.random.Generator) -> np.ndarray:
    """Draw one sign, at a random place of the lattice: [3, 64, 64] float32 in [0, 1]."""
    return compose(word, generator)[0]


def compose(word: str, generator: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """`render`'s picture, and the left and upper edge of its first letter in pixels."""
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5
    image = background(generator, y)
    width = LETTER_WIDTH * len(word)
    # letters start 2 pixels right of a lattice point, so that five of them fit between margins of 2
    left = 2 + 4 * int(generator.integers(0, (IMAGE_SIZE - 4 - width) // 4 + 1))
    top = 4 * int(generator.integers(1, (IMAGE_SIZE - 4 - LETTER_HEIGHT) // 4 + 1))
    plate = (x > left - 2) & (x < left + width + 2) & (y > top - 4) & (y < top + LETTER_HEIGHT + 4)
    paper, ink = generator.uniform(0.88, 0.98), generator.uniform(0.04, 0.14)
    image = np.where(plate[None], paper, image)
    letters = np.concatenate([_glyph(letter) for letter in word], axis=1)
    area = image[:, top : top + LETTER_HEIGHT, left : left + width]
    area += letters * (ink - area)
    return image.astype(np.float32), left, top


@lru_cache(maxsize=26)
def _glyph(letter: str) -> np.ndarray:
    """How much of each pixel a capital covers: [20, 12], from Pillow's own font, stretched to the cell."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=24 * _FINE)
    box = font.getbbox(letter, stroke_width=_FINE // 2)
    height = 18 * _FINE
    drawn = Image.new("L", (round(box[2] - box[0]), round(box[3] - box[1])))
    ImageDraw.Draw(drawn).text((-box[0], -box[1]), letter, 255, font, stroke_width=_FINE // 2)
    drawn = drawn.resize((min(drawn.width, 11 * _FINE), height), Image.Resampling.BILINEAR)
    cell = Image.new("L", (LETTER_WIDTH * _FINE, LETTER_HEIGHT * _FINE))
    cell.paste(drawn, ((cell.width - drawn.width) // 2, (cell.height - drawn.height) // 2))
    return np.asarray(cell.resize((LETTER_WIDTH, LETTER_HEIGHT), Image.Resampling.BOX), np.float32) / 255
