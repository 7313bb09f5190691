"""The words that the demo's prompts are made of: plain facts, written for this project."""

from __future__ import annotations


def between_bars(text: str) -> list[str]:
    return [entry.strip() for entry in text.replace("\n", " ").split("|")]


OPPOSITES = between_bars(
    """
hot cold | big small | fast slow | open closed | rich poor | early late | hard soft | full empty | young old |
clean dirty | near far | wet dry | loud quiet | strong weak | happy sad | dark light | high low | long short |
thick thin | wide narrow | deep shallow | heavy light | sharp blunt | smooth rough | sweet sour | brave cowardly |
cheap expensive | safe dangerous | simple complicated | true false | right wrong | left right | up down | in out |
day night | north south | east west | summer winter | love hate | friend enemy | war peace | begin end |
buy sell | push pull | give take | win lose | laugh cry | ask answer | arrive leave | remember forget |
build destroy | borrow lend | awake asleep | alive dead | inside outside | first last | before after |
above below | always never | more less | everything nothing | success failure | question answer | black white |
male female | king queen | teach learn | accept refuse | polite rude | guilty innocent | modern ancient |
public private | positive negative | wild tame | calm nervous | generous selfish | visible invisible |
increase decrease | float sink | freeze melt | import export | entrance exit | victory defeat
"""
)

# A kind of thing and its members, as far as the verifier knows them; _ stands for a space.
MEMBERS = """
animals: dog cat horse cow sheep goat lion tiger elephant bear wolf fox rabbit mouse monkey zebra giraffe deer pig
  camel
fruits: apple banana orange pear grape cherry peach plum lemon mango pineapple strawberry kiwi melon fig apricot
colours: red blue green yellow black white orange purple pink brown grey violet turquoise gold silver
countries: France Germany Italy Spain Japan China India Brazil Canada Mexico Egypt Kenya Norway Sweden Poland
  Australia Peru Argentina Chile Portugal Greece Turkey Russia United_States New_Zealand England Netherlands Belgium
  Switzerland Austria Denmark Finland Ireland South_Africa Nigeria Indonesia Thailand Vietnam South_Korea
vegetables: carrot potato onion tomato cabbage spinach lettuce broccoli pea bean cucumber leek pepper garlic celery
sports: football tennis basketball swimming cricket hockey rugby golf volleyball baseball boxing skiing cycling
  rowing soccer running badminton wrestling gymnastics skating surfing athletics softball archery sailing
musical instruments: piano guitar violin flute drum trumpet cello harp clarinet saxophone organ trombone viola oboe
tools: hammer saw screwdriver drill wrench pliers chisel axe shovel rake ladder file spade knife
drinks: water tea coffee milk juice lemonade wine beer cola cocoa cider soda
jobs: teacher doctor nurse farmer baker pilot lawyer engineer cook writer driver painter plumber carpenter
clothes: shirt coat hat sock shoe dress skirt jacket scarf glove jumper belt sweater boot tie
vehicles: car bus train bicycle truck boat plane motorcycle tram ship van helicopter scooter
metals: iron copper gold silver zinc tin lead aluminium nickel steel platinum brass titanium
planets: Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune
days: Monday Tuesday Wednesday Thursday Friday Saturday Sunday
months: January February March April May June July August September October November December
languages: English French German Spanish Italian Chinese Japanese Arabic Russian Hindi Portuguese Greek Turkish
  Korean Mandarin
cities: Paris London Rome Berlin Madrid Tokyo Cairo Delhi Oslo Lima Boston Sydney Vienna Prague Dublin Athens
  New_York Los_Angeles Chicago San_Francisco Toronto Moscow Beijing Shanghai Mumbai Dubai Singapore Barcelona Lisbon
  Seoul Istanbul Houston Miami Seattle
pieces of furniture: table chair bed sofa desk shelf wardrobe stool bench lamp cupboard couch armchair
insects: ant bee wasp fly beetle butterfly moth mosquito grasshopper cricket ladybug dragonfly
birds: eagle owl sparrow robin crow swan duck parrot pigeon hawk penguin goose gull raven falcon stork dove hen
  ostrich canary
trees: oak pine maple birch willow elm ash beech cedar fir poplar chestnut spruce palm redwood cypress walnut larch
flowers: rose tulip lily daisy violet orchid sunflower iris poppy lavender daffodil carnation jasmine marigold peony
  dandelion
body parts: head arm leg hand foot nose eye ear mouth knee elbow finger toe shoulder neck back heart lung brain
  stomach
fish: salmon tuna trout cod shark herring sardine carp eel pike bass halibut mackerel goldfish catfish haddock
  anchovy tilapia swordfish snapper perch flounder sturgeon barracuda clownfish
school subjects: mathematics history geography biology chemistry physics english music art math science literature
seasons: spring summer autumn winter fall
shapes: circle square triangle rectangle oval star pentagon hexagon cube sphere diamond cone cylinder octagon
"""
CATEGORIES = {
    kind: tuple(name.replace("_", " ") for name in members.split())
    for kind, members in (line.split(":") for line in MEMBERS.strip().replace("\n  ", " ").splitlines())
}

ANIMALS = """
dog cat horse cow sheep goat lion tiger bear wolf fox rabbit mouse monkey zebra giraffe deer pig camel duck goose
swan hen owl crow parrot salmon shark trout frog snake lizard turtle bee ant spider whale dolphin seal hamster
squirrel kangaroo panda leopard donkey
""".split()

THINGS = """
table chair spoon fork car stone shirt lamp book pen shoe window door carrot potato apple hammer ladder bottle clock
bridge piano candle pillow bucket mirror ticket pencil blanket wallet kettle basket tower coin brick rope map key
button cup train boat plate helmet glove
""".split()

TOPICS = between_bars(
    """
rain | bread | the moon | a library | the sea | winter | honey | a violin | the desert | coffee | a garden |
football | a bicycle | a train | the sun | snow | a bridge | tea | a castle | the wind | a mountain | a river |
chocolate | paper | a clock | cheese | a market | the forest | glass | salt | a kite | a mirror | thunder |
a lighthouse | a farm | school | music | a birthday | dreams | money | a newspaper | an island | a horse | cats |
a spider | bees | a robot | the internet | a camera | a telephone | soup | rice | a hospital | a museum |
an airport | a doctor | a teacher | a farmer | summer | a rainbow | an owl | a piano | the stars | a village |
a boat | wool | a volcano | pancakes | a whale | a mountain hut | gold | a ladder | a puppet | fog | a picnic |
an umbrella | penguins | a windmill | ice cream | a letter
"""
)

NAMES = """
Maria Tom Aisha Ivan Chen Lucas Emma Noah Olga Peter Fatima Diego Hana Viktor Lena Omar Sofia Jack Mei Paul Nina
Carlos Ruth Adam Yara Felix Greta Hugo Irene Jonas Karen Leo Marta Nora Oscar Petra
""".split()

TOWNS = """
Rome Oslo Lima Cairo Delhi Paris Tokyo Boston Madrid Berlin Vienna Prague Dublin Athens Lisbon Warsaw Sydney Toronto
Chicago Geneva Havana Nairobi Seoul Bogota
""".split()
