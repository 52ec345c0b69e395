"""The kinds of products of a generated catalogue: their names, what can be said of them, what they cost."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of product.

    Attributes:
        noun: what it is called.
        category: department.
        path: categories, from the department down.
        attributes: what can hold for one.
        options: values that an option can have, by name.
        cost: lowest and highest price in dollars.
    """

    noun: str
    category: str
    path: tuple[str, ...]
    attributes: tuple[str, ...]
    options: dict[str, tuple[str, ...]]
    cost: tuple[float, float]


_DEPARTMENTS = {
    "beauty": "Beauty & Personal Care",
    "electronics": "Electronics",
    "fashion": "Clothing, Shoes & Jewelry",
    "garden": "Home & Kitchen",
    "grocery": "Grocery & Gourmet Food",
}
_VALUES = {
    "colors": "black/white/navy/grey/red/blue/green/purple/pink/yellow/orange/brown/beige/teal/ivory/khaki/silver",
    "clothes": "x-small/small/medium/large/x-large/xx-large",
    "shoes": "6/6.5/7/7.5/8/8.5/9/9.5/10/11",
    "beds": "twin/full/queen/king/california king",
    "packs": "pack of 1/pack of 2/pack of 3/pack of 6/pack of 12",
    "weights": "4 ounce/8 ounce/12 ounce/16 ounce/2 pound/5 pound",
    "lengths": "3 feet/6 feet/10 feet/15 feet/25 feet/50 feet",
    "flavors": "vanilla/chocolate/strawberry/lemon/caramel/coconut/cinnamon/peach/mango/ginger/hazelnut/maple",
    "scents": "lavender/rose/sandalwood/citrus/eucalyptus/jasmine/cedar/unscented/honey/peony",
}
_ATTRIBUTES = {
    "wear": "machine washable, hand wash only, quick drying, tumble dry, wrinkle resistant, everyday wear",
    "food": "gluten free, sugar free, low sodium, non gmo, kosher certified, plant based, high protein",
    "skin": "cruelty free, paraben free, sulfate free, dermatologist tested, fragrance free, tea tree",
    "power": "fast charging, long lasting, noise cancelling, high resolution, plug and play, water resistant",
    "house": "easy assemble, space saving, heavy duty, solid wood, stain resistant, easy clean",
}
# Name | department > path | price | a set of attributes and its own | options with a set of values or their own
_TABLE = """
shirt | fashion > Men > Shirts | 12 to 60
    wear, slim fit, long sleeve, button closure | color=colors, size=clothes
dress | fashion > Women > Dresses | 18 to 90
    wear, empire waist, short sleeve, knee length | color=colors, size=clothes
hoodie | fashion > Men > Hoodies | 20 to 70
    wear, fleece lined, drawstring waist, polyester spandex | color=colors, size=clothes
leggings | fashion > Women > Leggings | 10 to 45
    wear, tummy control, high waist, nylon spandex | color=colors, size=clothes
jacket | fashion > Men > Jackets | 35 to 160
    wear, faux fur, zipper closure, wind resistant | color=colors, size=clothes
swimsuit | fashion > Women > Swimwear | 16 to 65
    wear, tie back, padded cups, moisture wicking | color=colors, size=clothes
sneakers | fashion > Shoes > Sneakers | 30 to 120
    wear, rubber sole, arch support, memory foam | color=colors, size=shoes
sandals | fashion > Shoes > Sandals | 15 to 70
    wear, ankle strap, open toe, ethylene vinyl | color=colors, size=shoes
boots | fashion > Shoes > Boots | 40 to 180
    wear, steel toe, side zipper, leather sole | color=colors, size=shoes
shampoo | beauty > Hair Care > Shampoo | 6 to 35
    skin, damaged hair, hair growth, argan oil | scent=scents, size=packs
conditioner | beauty > Hair Care > Conditioner | 6 to 35
    skin, curly hair, color treated, coconut oil | scent=scents, size=packs
lotion | beauty > Skin Care > Lotion | 5 to 40
    skin, sensitive skin, hyaluronic acid, shea butter | scent=scents, size=packs
serum | beauty > Skin Care > Serum | 12 to 75
    skin, fine lines, dark circles, green tea | scent=scents, size=packs
lipstick | beauty > Makeup > Lips | 5 to 30
    skin, matte finish, smudge proof, vitamin enriched | color=colors, size=packs
toothbrush | beauty > Oral Care > Toothbrushes | 4 to 60
    skin, teeth whitening, bpa free, bad breath | color=colors, size=packs
headphones | electronics > Audio > Headphones | 20 to 250
    power, stereo sound, carrying case, tangle resistant | color=colors
speaker | electronics > Audio > Speakers | 20 to 220
    power, hands free, shock proof, deep bass | color=colors, style=compact/tower/clip on
charger | electronics > Accessories > Chargers | 8 to 50
    power, wall mount, travel size, overheat protection | color=colors, size=lengths
cable | electronics > Accessories > Cables | 5 to 40
    power, gold plated, high speed, nylon braided | color=colors, size=lengths
camera | electronics > Photo > Cameras | 60 to 600
    power, motion detection, optical zoom, night vision | color=colors, style=body only/one lens kit/two lens kit
keyboard | electronics > Computers > Keyboards | 15 to 140
    power, aluminum alloy, quiet keys, wrist rest | color=colors, style=full layout/tenkeyless/sixty percent
tablet | electronics > Computers > Tablets | 70 to 500
    power, quad core, dual band, usb port | color=colors, size=32 gb/64 gb/128 gb/256 gb
sofa | garden > Furniture > Sofas | 180 to 900
    house, tufted back, metal legs, velvet cover | color=colors, style=loveseat/three seater/sectional
bookcase | garden > Furniture > Bookcases | 50 to 320
    house, white finish, adjustable shelves, glass doors | color=colors, style=three tier/four tier/five tier
mattress | garden > Bedroom > Mattresses | 120 to 800
    house, memory foam, cooling gel, pressure relief | size=beds, style=firm/plush/hybrid
curtains | garden > Decor > Curtains | 15 to 90
    house, light blocking, machine washable, rod pocket | color=colors, size=63 inch/84 inch/96 inch/108 inch
rug | garden > Decor > Rugs | 20 to 260
    house, non slip, low pile, spot clean | color=colors, size=2 by 3/4 by 6/5 by 8/8 by 10
lamp | garden > Lighting > Lamps | 18 to 140
    house, bronze finish, glass shade, dimmable bulb | color=colors, style=desk/floor/clamp
candle | garden > Decor > Candles | 8 to 45
    house, soy wax, lead free, clean burning | scent=scents, size=packs
coffee | grocery > Beverages > Coffee | 8 to 50
    food, single origin, dark roast, usda organic | flavor=flavors, size=weights
tea | grocery > Beverages > Tea | 5 to 35
    food, caffeine free, loose leaf, individually wrapped | flavor=flavors, size=weights
cookies | grocery > Snacks > Cookies | 4 to 40
    food, individually wrapped, dairy free, artificial flavors | flavor=flavors, size=packs
granola | grocery > Breakfast > Granola | 5 to 40
    food, whole grain, nut free, low fat | flavor=flavors, size=weights
sauce | grocery > Pantry > Sauces | 4 to 30
    food, ready to eat, dairy free, shelf stable | flavor=flavors, size=packs
"""


def _read(row: str) -> Kind:
    noun, path, cost, attributes, options = (cell.strip() for cell in row.replace("\n", "|").split("|"))
    department, *steps = path.split(" > ")
    low, high = cost.split(" to ")
    general, own = attributes.split(", ", 1)
    pairs = (option.split("=") for option in options.split(", "))
    return Kind(
        noun=noun,
        category=department,
        path=(_DEPARTMENTS[department], *steps),
        attributes=tuple(f"{_ATTRIBUTES[general]}, {own}".split(", ")),
        options={name: tuple(_VALUES.get(values, values).split("/")) for name, values in pairs},
        cost=(float(low), float(high)),
    )


KINDS: tuple[Kind, ...] = tuple(_read(row) for row in re.split(r"\n(?=\S)", _TABLE.strip()))
"""They take turns in a catalogue."""
