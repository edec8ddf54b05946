"""The tiny world's language: its words, what can be asked for, and how answers sound.

A request names three things, one for each slot of its kind:

    story  (who, mood, place)     letter (who, thing, place)
    news   (who, thing, mood)     plan   (who, thing, place)

4 kinds, 5 phrasings each and about 50 words a slot make 2.6 million distinct requests.
The four word lists share no word with each other nor with any sentence frame, so that
"is this word there?" has one answer.
"""

WORDS = {
    "who": (
        "fox bear wolf cat dog hen goat sheep cow pig horse mouse rabbit frog toad snake lion "
        "tiger monkey camel deer duck goose swan crow robin king queen prince knight witch "
        "wizard giant pirate farmer baker miller sailor doctor teacher painter singer hunter "
        "fisher tailor driver girl boy baby nurse monk robot ghost dragon dwarf"
    ).split(),
    "mood": (
        "sad happy brave calm shy proud tired hungry lazy busy jolly grumpy lonely clever silly "
        "gentle kind scared bored curious cheerful patient nervous polite rude honest greedy "
        "quiet noisy sleepy thirsty lucky dizzy merry bold wise strict humble jealous angry"
    ).split(),
    "thing": (
        "lamp ball book ring hat coat boot sock key coin cup plate spoon fork pot pan bag box "
        "basket drum flute bell kite doll rope net broom brush pen map clock mirror candle "
        "carpet pillow blanket chair table ladder hammer bucket bottle cake pie pear cheese "
        "sword shield crown scarf glove"
    ).split(),
    "place": (
        "river forest mill lake hill castle bridge tower cave beach garden market school church "
        "farm barn harbor park desert valley meadow field station library museum bakery village "
        "city palace cabin hotel temple swamp cliff canyon pond well fountain road tunnel mine "
        "stable cellar kitchen theater prison zoo gate mountain jungle"
    ).split(),
}
SLOT_OF = {word: slot for slot, words in WORDS.items() for word in words}

SLOTS = {
    "story": ("who", "mood", "place"),
    "letter": ("who", "thing", "place"),
    "news": ("who", "thing", "mood"),
    "plan": ("who", "thing", "place"),
}

REQUESTS = {
    "story": (
        "Write a story about a {mood} {who} at the {place}.",
        "Tell me a tale of a {who} that is {mood} and goes to the {place}.",
        "Can you tell a story? It needs a {mood} {who} and the {place}.",
        "At the {place} there is a {mood} {who}. Write its story.",
        "I want a story in which a {who} is {mood} near the {place}.",
    ),
    "letter": (
        "Write a letter to a {who} about its {thing} and the {place}.",
        "Send a note to the {who} that its {thing} is at the {place}.",
        "Tell the {who} in a letter that the {thing} is near the {place}.",
        "The {thing} of the {who} is at the {place}. Write a letter.",
        "Please write to the {who} about a {thing} from the {place}.",
    ),
    "news": (
        "Write the news about a {who} with a {thing} that makes people {mood}.",
        "Report on the {who} that has a {thing} and on the {mood} people.",
        "People are {mood} since a {who} has a {thing}. Write the news.",
        "What is new? Report that a {who} and its {thing} make people {mood}.",
        "I need news of a {thing}, a {who} and {mood} people.",
    ),
    "plan": (
        "Plan a day with the {who}, a {thing} and the {place}.",
        "Make a plan for a {who} and its {thing} at the {place}.",
        "We want to see the {place} with the {who} and a {thing}. Make a plan.",
        "Please plan a party at the {place} with a {who} and a {thing}.",
        "How can we bring a {thing} and a {who} to the {place}? Plan it.",
    ),
}

# An answer: one sentence for each slot, in the order of SLOTS, then its kind's closing line.
ANSWERS = {
    "story": (
        ("Once there was a {}.", "This is the tale of a {}.", "Far away lived a {}."),
        ("It felt {}.", "It was always {}.", "That day it was very {}."),
        ("It slept by the {}.", "It walked to the {}.", "It played at the {}."),
    ),
    "letter": (
        ("Dear {}, how are you?", "Hello {}, it is me.", "My good {}, I write to you."),
        ("I found your {}.", "I have kept your {}.", "I will bring you the {}."),
        ("Come to the {}.", "Meet me near the {}.", "I wait at the {}."),
    ),
    "news": (
        ("Today we saw a {}.", "People talk about a {}.", "A {} came to town."),
        ("It had a {}.", "It showed us a {}.", "It took a {} along."),
        ("Now everyone is {}.", "The town is {}.", "We are all {}."),
    ),
    "plan": (
        ("First we call the {}.", "First we visit the {}.", "First we ask the {}."),
        ("Then we pack the {}.", "Then we buy a {}.", "Then we fetch a {}."),
        ("At last we go to the {}.", "We all meet at the {}.", "We stay at the {}."),
    ),
}
CLOSINGS = {
    "story": "The end.",
    "letter": "Your friend.",
    "news": "More news soon.",
    "plan": "Have fun.",
}
# What a writer may throw in without being asked.
EXTRAS = {
    "who": "There was also a {}.",
    "mood": "And I am {} too.",
    "thing": "Do not forget the {}.",
    "place": "Later came the {}.",
}
