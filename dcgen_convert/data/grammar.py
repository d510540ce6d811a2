"""The built-in prompts: thousands of subjects, each a noun with something that it is or does, in a setting and a style.

Picture after picture takes the next noun, and every noun again with another phrase. So the first `nouns()` prompts show
as many nouns, and the first `subjects()` prompts as many subjects, before one comes a second time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count as counter
from itertools import islice

from dcgen_convert.data.earlier_prompts import DETAILS, LIGHTS


@dataclass(frozen=True)
class Group:
    """Nouns that the same phrases and places suit. A phrase with {} takes the noun; else it stands behind it."""

    nouns: tuple[str, ...]
    phrases: tuple[str, ...]
    places: tuple[str, ...]


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.replace("\n", " ").split("|"))


OUTSIDE = _parts("""
    in a dense forest|on a frozen lake|by a country road|on a beach|at the foot of a volcano|in a meadow|
    on a hillside|beside a river|in a dry valley|at the edge of a village|under tall pines|on a rocky coast|
    in deep snow|in the rain|in a field of barley|beside a waterfall|in a city park|in a salt desert|among sand dunes|
    in a marsh|on a cliff
""")
TOWN = _parts("""
    in a quiet harbour|on a rooftop|in a crowded square|under a bridge|in a subway station|in a narrow alley|
    on a wide avenue|in front of a cinema|at a bus stop|in a courtyard|beside a canal|on a stone staircase|
    in a bazaar|in an old quarter|on a pier|in a car park|at a crossing|in front of a brick wall|beside a fountain|
    in a suburb
""")
INSIDE = _parts("""
    in a sunlit kitchen|in an abandoned factory|in a studio|in a library|in a small workshop|in an attic|
    in a classroom|in a hotel lobby|in a museum hall|in a waiting room|in a cellar|in a tiled bathroom|in a theatre|
    in a laboratory|in a log cabin|in a white room|in a cluttered garage|in an empty ballroom|in a tailor's shop|
    in a corridor
""")
SURFACES = _parts("""
    on a wooden table|on a marble counter|on a window sill|on a stone floor|on a checked tablecloth|on a metal tray|
    on a velvet cushion|on a shelf|on a workbench|on wet cobblestones|on a pile of newspapers|on a glass plate|
    on sand|on moss|on a market stall|on a white background|on a black background|on a picnic blanket|on a desk|
    in a wooden box
""")

GROUPS = (
    Group(
        nouns=_parts("""
    a young woman|an old man|a boy|a girl|a grandmother|a farmer|a nurse|a bricklayer|a ballet dancer|a teacher|
    a sailor|a street musician|a cook|a potter|a firefighter|a carpenter|a bride|a painter|a postman|a scientist|
    a tailor|a judge|a fisherwoman|a shepherd|a mechanic|a librarian|a swimmer|a boxer|a monk|a clown|a pilot|
    a gardener|a blacksmith|a barber|a violinist|a baker|a cyclist|a climber|a surgeon|a photographer|a weaver|
    a beekeeper|a waiter|a drummer|a miner|a knight|an astronaut|a magician|a grandfather|a student|a dockworker|
    a welder|a florist|a chess player
        """),
        phrases=_parts("""
    reading a letter|laughing|looking over the shoulder|with folded arms|drinking tea|tying a shoe|
    holding an umbrella|waving at someone|carrying a heavy sack|asleep on a bench|peeling an orange|
    in a yellow raincoat|with a red scarf|wearing round glasses|pointing at the sky|writing in a notebook|
    counting coins|playing with a dog|running|with a hand on the chin|sitting cross-legged|lighting a candle|
    pushing a bicycle|in a blue coat|feeding pigeons|listening to a radio|holding a newborn baby|with freckles|
    singing|with a long braid|blowing on hot soup|talking on a telephone|looking into a mirror|climbing a ladder|
    shaking hands with a friend|seen from behind
        """),
        places=TOWN + INSIDE + OUTSIDE,
    ),
    Group(
        nouns=_parts("""
    a red fox|a snow leopard|a tabby cat|a greyhound|a barn owl|a hedgehog|a brown bear|a wolf|a horse|a donkey|
    a goat|a rooster|a swan|a heron|a kingfisher|a toad|a tortoise|a chameleon|a gecko|an elephant|a giraffe|a zebra|
    a rhinoceros|a hippopotamus|a lion|a tiger|a lynx|a badger|an otter|a beaver|a squirrel|a rabbit|a field mouse|
    a bat|a moose|a reindeer|a bison|a camel|a llama|a kangaroo|a koala|a chimpanzee|a gorilla|a lemur|a panda|
    a peacock|a parrot|a toucan|a penguin|a pelican|an eagle|a raven|a sparrow|a crocodile|a cobra|a sheepdog|
    a dachshund|a piglet|a calf
        """),
        phrases=_parts("""
    sleeping|drinking water|looking into the camera|running|stretching|with its young|eating a leaf|covered in snow|
    soaked with water|in tall grass|on a fallen trunk|hiding behind a stone|jumping|yawning|from the side|
    with a shadow behind it|close to a fence|beside a puddle|walking away|scratching itself|sitting alone|far away|
    the skeleton of {}|a carved wooden figure of {}|a mosaic of {}|a paper cut-out of {}|a plush toy of {}|
    a bronze statue of {}
        """),
        places=OUTSIDE,
    ),
    Group(
        nouns=_parts("""
    a city tram|a vintage motorcycle|a sailing boat|a steam engine|a delivery van|a double-decker bus|a tractor|
    a racing bicycle|a hot-air balloon|a fishing trawler|a fire engine|a cable car|a rowing boat|a helicopter|
    a biplane|a container ship|a freight train|a rickshaw|a horse carriage|a scooter|a camper van|a pickup truck|
    a convertible|a submarine|an icebreaker|a hovercraft|a glider|a gondola|a bulldozer|a crane truck|a snow plough|
    a dog sledge|a barge|a police car|an ambulance|a go-kart|a cargo bicycle|a canoe|a ferry|a monorail
        """),
        phrases=_parts("""
    at full speed|parked|covered in rust|freshly painted in green|with its lights on|being repaired|half buried|
    loaded with crates|full of people|without anyone in it|with an open door|with a broken window|in a row of three|
    turning|arriving|leaving|from the front|from behind|a toy model of {}|a technical drawing of {}|painted yellow|
    with white stripes|the wreck of {}|covered in chrome|a tin toy of {}|a poster that shows {}
        """),
        places=TOWN + OUTSIDE,
    ),
    Group(
        nouns=_parts("""
    a bowl of ramen|a loaf of rye bread|a plate of oysters|a cherry pie|a pot of lentil soup|a fruit salad|
    a cheese board|a stack of pancakes|a roast chicken|a bowl of cherries|a cut watermelon|a basket of mushrooms|
    a string of garlic|a jar of honey|a cup of coffee|a glass of lemonade|a chocolate cake|a plate of dumplings|
    a bunch of grapes|a pineapple|an artichoke|a head of red cabbage|a pile of chestnuts|a tray of macarons|
    a fried egg|a grilled trout|a pan of paella|a bowl of rice|a sandwich|an apple|a lemon|a pomegranate|a pumpkin|
    a bunch of radishes|a croissant|a skewer of prawns|a bowl of olives|a pizza|an ice cream cone|a slice of cheese|
    a bag of spices|a plate of sushi
        """),
        phrases=_parts("""
    with steam above it|cut in half|half eaten|with a knife beside it|sprinkled with herbs|in a blue dish|
    wrapped in paper|beside an empty glass|seen from above|with crumbs around it|under a glass cover|
    with a folded napkin|dusted with flour|beside a vase|held in two hands|with a paper flag|drizzled with oil|
    on a plate with a golden rim|with a wooden spoon|in a copper pan|beside a burning candle|with water drops|
    a clay model of {}|a knitted version of {}|two forks beside {}
        """),
        places=SURFACES,
    ),
    Group(
        nouns=_parts("""
    a glass teapot|a pocket watch|a grand piano|a typewriter|a pair of scissors|a wicker basket|a violin|a trumpet|
    a suitcase|a desk lamp|a globe|a compass|a chess set|a rocking chair|a sewing machine|a wall clock|a camera|
    a telescope|a leather boot|a straw hat|an umbrella|a rope|a padlock|a bunch of keys|a candlestick|a mirror|
    a wooden spoon|a kettle|a toolbox|a hammer|a birdcage|a porcelain doll|a spinning top|a drum|a music box|
    a chandelier|an armchair|a bookcase|a radio|a bicycle wheel|an anchor|a microscope|an hourglass|a fishing net|
    a paper lantern|a fountain pen|a vase|a chest of drawers|a weathervane|a ladder|a barrel|a wheelbarrow|a mask|
    a crown|a shield|an accordion|a hairbrush|a pair of spectacles|a book with a red cover|a stack of letters|
    a teddy bear|a snow globe|a ship in a bottle|a helmet
        """),
        phrases=_parts("""
    made of wood|made of brass|made of green glass|made of clay|covered in dust|broken in two|wrapped in string|
    in a glass case|upside down|beside a bunch of tulips|with a price tag|hanging from a hook|tied with a ribbon|
    casting a long shadow|in pieces, laid out in order|in a larger and a smaller size|an antique version of {}|
    a child's drawing of {}|a giant version of {}, as tall as a house|a miniature of {} beside a coin|
    held up by a hand|with a bird on it|under water|painted with blue flowers|in a drawer|seen through a keyhole|
    with a scratch
        """),
        places=SURFACES + INSIDE,
    ),
    Group(
        nouns=_parts("""
    a sunflower|an oak tree|a cactus|a field of poppies|a water lily|a fern|a bonsai|a rose bush|a birch grove|
    an orchid|a mushroom|a dandelion|a palm tree|a vineyard|a lavender field|a cherry tree|an ivy-covered arch|
    a thistle|a willow|a bamboo grove|a tulip|a maple tree|a pine cone|a bed of moss|an olive tree|a foxglove|
    a patch of clover|a reed bed|a pear tree|a snowdrop|a hedge|a banana plant
        """),
        phrases=_parts("""
    in bloom|in autumn|covered in frost|after rain|with a bee|bent by the wind|growing through stone|in a clay pot|
    beside a fence|with a ladder beside it|with a spider's web|against the sky|with morning dew|reflected in a pond|
    withered|with one yellow leaf|lit from behind|a pressed specimen of {}|a botanical plate of {}|
    an embroidery of {}|a stained-glass window with {}|with a butterfly|with a string of lights|with a wooden label
        """),
        places=OUTSIDE,
    ),
    Group(
        nouns=_parts("""
    a lighthouse|a mountain village|a street market|a greenhouse|a wooden bridge|a bakery|a windmill|a castle|
    a chapel|a mosque|a pagoda|a skyscraper|a log cabin|a railway station|a stone tower|a barn|a theatre|a water mill|
    a petrol station|a football stadium|an amphitheatre|a lock on a canal|a dam|a tea house|a factory|
    a block of flats|an observatory|a bookshop|a swimming pool|a playground|a ruin|a spiral staircase|a tunnel|
    a harbour crane|a water tower|a palace|a yurt|a tree house|a monastery|a fairground|a cemetery|a phone box|
    a city gate|a fortress|a flower shop|a hospital
        """),
        phrases=_parts("""
    under construction|with lit windows|overgrown with plants|reflected in water|from the air|from far away|
    with scaffolding|with a queue in front of it|without people|with a flag on top|decorated for a festival|
    with a blue door|half in shadow|during a flood|with smoke above it|surrounded by birds|
    with laundry on a line in front|a cardboard model of {}|a floor plan of {}|a map that shows {}|
    a sand castle in the shape of {}|a matchbox label with {}|in the year 1900|in the far future|
    with children playing in front of it
        """),
        places=OUTSIDE + TOWN,
    ),
    Group(
        nouns=_parts("""
    a coral reef|a thunderstorm|a waterfall|a volcano|a glacier|a cave|a canyon|an iceberg|a rainbow|a river delta|
    a geyser|a starry sky|the full moon|a comet|a ringed planet|a sand dune|a rice terrace|a mountain pass|a lake|
    a whirlpool|a tornado|northern lights|a meteor crater|a sea stack|a salt flat|a hot spring|a lagoon|an avalanche|
    a fjord|an island
        """),
        phrases=_parts("""
    with a single traveller|with a small boat|with a flock of birds|with a road that leads there|behind a wire fence|
    seen through a window|seen from a train|seen from the air|in winter|in summer|in the early morning mist|
    with tents|a relief map of {}|a postcard of {}|a quilt with {}|with two hikers|with a lone tree|with wild horses|
    with a telescope in front|with a wooden sign|in three colours only|painted on a wall|with footprints|
    under red clouds
        """),
        places=(
            "in the distance",
            "in the background",
            "filling the picture",
            "behind a row of trees",
            "in the centre",
        ),
    ),
    Group(
        nouns=_parts("""
    OPEN|CLOSED|HOTEL|NO PARKING|BREAD|WELCOME|EXIT|SALE|PLATFORM 9|MIND THE STEP|COFFEE|BOOKS|TO LET|QUIET PLEASE|
    FRESH EGGS|LOST CAT|TICKETS|HARBOUR|THANK YOU|HAPPY BIRTHDAY|ROOM 12|WET PAINT|NORTH|SOUP OF THE DAY|1984|
    GOOD LUCK
        """),
        phrases=_parts("""
    a handwritten sign that says {}|a neon sign that says {}|a wooden board with the word {} carved into it|
    an enamel plate that says {}|a chalk board with {} on it|a rubber stamp print of {}|graffiti that says {}|
    a T-shirt with {} on it|a newspaper headline that says {}|a cake with {} in icing|a book cover with the title {}|
    {} embroidered on a cushion|{} written in sand|{} written in snow|{} in letters of balloons|a poster that says {}|
    {} painted on the side of a van|a flag with {} on it|a rusty metal sign that says {}|a matchbox that says {}
        """),
        places=("on a wall", "on a door", "in a shop window", "beside a street", "in an office", "above an entrance"),
    ),
    Group(
        nouns=_parts("""
    eggs|cats|chairs|bottles|candles|balloons|apples|bicycles|birds|children|books|dice|boats|buttons|cups|dogs|
    horses|keys|lamps|mushrooms|pencils|shoes|stones|trees|umbrellas|windows|fish|coins|flowers|snowmen
        """),
        phrases=_parts("""
    two {}|three {}|four {}|five {}|six {}|seven {}|nine {}|a dozen {}|two large {} and one small one|a circle of {}|
    a row of {}, the third one red|many {} of the same colour|one of the {} is missing|a pyramid of {}|
    two {}, one left of a box and one on top of it|three {} in a line from small to large|a shadow play of {}|
    a pattern of {}|four {} in four colours|a pair of {} behind glass
        """),
        places=("on a white background", "on a lawn", "in a large room", "on a stage", "on a grey floor", "at the sea"),
    ),
)
STYLES = _parts("""
    a photograph|a photograph|a photograph|a photograph|a photograph|a black and white photograph|
    an instant photograph|a long exposure|a film still|a wide shot|a close-up|a flash photograph|a watercolour|
    an oil painting|a pencil sketch|a charcoal drawing|a children's book illustration|a woodcut|an isometric render|
    a flat vector drawing|a comic panel|a pastel|an etching|a gouache|a 3D render|a pixel-art picture|an ink drawing|
    a linocut|a collage|a fresco|a mural|a fashion plate
""")
Noun = tuple[int, str]  # number of its group, and its words


def prompts(count: int, seed: int) -> list[str]:
    """``count`` prompts; a larger count begins with the same ones."""
    generator = random.Random(f"settings {seed}")
    found = []
    for number, subject in islice(_subjects(seed), count):
        style, place, light, detail = (
            generator.choice(slot) for slot in (STYLES, GROUPS[number].places, LIGHTS, DETAILS)
        )
        found.append(f"{style}: {subject}, {place}, {light}, {detail}")
    return found


def nouns() -> int:
    """Nouns that the prompts are about."""
    return len(_nouns())


@cache
def subjects() -> int:
    """Different pairs of a noun and what it is or does."""
    return sum(len(group.nouns) * len(group.phrases) for group in GROUPS)


def settings() -> int:
    """Different phrases for the style, the place, the light and a detail."""
    places = {place for group in GROUPS for place in group.places}
    return len(set(STYLES)) + len(places) + len(LIGHTS) + len(DETAILS)


def _nouns() -> list[Noun]:
    return [(number, noun) for number, group in enumerate(GROUPS) for noun in group.nouns]


def _subjects(seed: int) -> Iterator[tuple[int, str]]:
    """Group and words of subject after subject, without end. Each round takes each noun that has a new phrase."""
    generator = random.Random(f"subjects {seed}")
    every = _nouns()
    left: dict[Noun, list[str]] = {}
    for turn in counter():
        if not left:  # at the start, and when every subject was used
            left = {noun: generator.sample(GROUPS[noun[0]].phrases, len(GROUPS[noun[0]].phrases)) for noun in every}
        round_ = sorted(left)
        random.Random(f"round {seed} {turn}").shuffle(round_)
        for noun in round_:
            yield noun[0], _subject(noun[1], left[noun].pop())
            if not left[noun]:
                del left[noun]


def _subject(noun: str, phrase: str) -> str:
    return phrase.format(noun) if "{}" in phrase else f"{noun} {phrase}"
