"""Plain English words that keys, lists and replies are made of."""

_ADJECTIVES = """
    able ancient ashen awake bitter blank bold brave brief bright brisk broad broken calm careful
    cheap clean clear clever cloudy coarse cold common cosy crisp curious curved daily damp dark
    dear deep dense distant double dry dull dusty eager early earnest easy empty equal even exact
    faint fair famous fast fierce fine firm fit flat fond formal foul frail free fresh frozen full
    gentle giant glad golden good grand grave great green grey happy hard hasty heavy hidden high
    hollow honest hot huge humble idle inner jolly just keen kind lame large late lazy lean level
    light little lively local lone long loose loud loyal lucky mature meek mellow merry mild minor
    modest moist narrow naval neat new nimble noble noisy northern novel odd old open outer oval
    pale patient plain polite proud public pure quick quiet rapid rare raw ready real regal rich
    rigid ripe rough round royal rural rusty sacred sad safe salty scarce secret sharp shiny short
    shy silent simple slim slow small smart smooth sober soft solid sour spare steady steep
    stern still stout strange strict strong subtle sudden sunny sure sweet swift tall tame tart
    tender thick thin tidy tight tiny tired true urban usual vague vast vivid warm wary weary wet
    white whole wide wild wise witty wooden worthy young
"""
_NOUNS = """
    acorn actor anchor ankle anvil apple apron arch arrow atlas attic axle badge baker ballad
    banjo barley barrel basin basket beacon beaver bell bench berry bishop blanket blossom boat
    bonnet border bottle boulder branch bread brick bridge bronze brook broom bucket buckle butter
    button cabin cable camel candle canoe canyon carpet carrot castle cattle cavern cedar cellar
    chapel cherry chimney circle citadel clay cliff clock clover cobbler collar comet compass
    copper coral cottage cotton cousin cradle crane crater cricket crown crystal curtain cymbal
    dagger daisy dancer desert diamond dinner doctor dolphin donkey door dragon drawer drum duchess
    eagle easel elbow elm ember engine estate fabric falcon farmer feather fence ferry fiddle field
    finger flask flute forest fossil fountain fox galley garden garlic gate ginger glacier glass
    glove goat gospel grain granite grape guitar hammer hamlet harbor harp harvest hazel helmet
    herald heron hill hinge honey horizon horn hotel hunter iceberg inlet insect island ivory jacket
    jaguar jewel journal judge jungle kernel kettle kitten ladder lagoon lake lantern laurel leaf
    ledger lemon lettuce library lily linen lion lizard lobster locket lumber magnet mango maple
    marble market meadow melon meteor mill mirror monk moon morning mountain museum nectar needle
    nephew nest nickel notebook nutmeg oak oasis ocean olive onion orchard organ otter owl paddle
    palace panther paper parade parcel parrot pasture peach pearl pebble pencil pepper piano pigeon
    pillar pilot pine planet plaza plough pocket poet pond poplar potter prairie prince pulley
    quarry quartz quilt rabbit raft raven reed ribbon ridge river robin rocket roof rope saddle
    sailor salmon sandal satin scarf scholar school sea shadow shelf shepherd ship shore silver
    singer sister sleeve smith spade sparrow spider spring squire stable stone stove stream sugar
    summit swan table tailor temple thimble thistle thread thunder tiger timber tower trail trumpet
    tulip tunnel turtle valley vessel village vine violin wagon walnut water weaver whale wheat
    wheel willow window winter wizard wolf wool wren yard
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
