"""Questions for a target to answer while a draft learns from its answers: forms of asking times things to ask about.

None of them is in ``data/prompts``, whose prompts measure the draft: not one, nor what one is about (tested).
"""

import random
from collections.abc import Iterator

ABOUT_A_THING = (
    """
What is {}?|What are the main parts of {}?|How does {} work?|Why is {} important?|Give me five facts about {}.
Explain {} in simple terms.|Explain {} to a teenager.|What is the history of {}?|Write a short story about {}.
Write a paragraph about {}.|What are the advantages and disadvantages of {}?|Who should know about {}, and why?
What are common mistakes people make about {}?|Summarize what is known about {}.|What is surprising about {}?
Write a haiku about {}.|What does {} have to do with everyday life?|Describe {} to someone who has never heard of it.
Tell me something interesting about {}.|How has {} changed over time?|What questions should I ask an expert on {}?
Write an introduction for an article about {}.|What would the world be like without {}?|Why do people care about {}?
Make a list of words that have to do with {}, and define each.|What are three examples of {}?|Can you tell me about {}?
How would you describe {} in one sentence?|What causes problems with {}?|Is {} good or bad? Give both sides.
""".strip()
    .replace("\n", "|")
    .split("|")
)

THINGS = (
    """
photosynthesis, gravity, the moon, volcanoes, earthquakes, rainbows, thunder, the water cycle, ocean tides, deserts,
glaciers, coral reefs, rain forests, honey bees, ants, elephants, whales, dolphins, owls, penguins, sharks, butterflies,
spiders, snakes, wolves, horses, dogs, chickens, dinosaurs, fossils, mushrooms, trees, roses, tomatoes, potatoes, rice,
bread, cheese, chocolate, coffee, tea, salt, sugar, olive oil, garlic, pizza, soup, ice cream, breakfast, vitamins,
protein, sleep, dreams, memory, the heart, the brain, blood, bones, the skin, the eye, hearing, taste, the flu, allergies,
stress, happiness, friendship, trust, courage, patience, curiosity, creativity, leadership, teamwork, honesty, humor,
democracy, elections, human rights, taxes, money, banks, inflation, insurance, the stock market, trade, advertising,
small businesses, unemployment, poverty, education, universities, libraries, museums, books, poetry, novels, fairy tales,
newspapers, radio, television, films, photography, painting, sculpture, architecture, bridges, castles, pyramids,
cathedrals, skyscrapers, cities, villages, maps, compasses, clocks, calendars, the alphabet, languages, translation,
handwriting, the printing press, paper, glass, steel, concrete, plastic, rubber, cotton, silk, wool, gold, diamonds, oil,
coal, solar panels, wind turbines, nuclear power, batteries, electricity, magnets, light bulbs, lasers, telescopes,
microscopes, cameras, telephones, smartphones, computers, the internet, email, search engines, social media, video games,
robots, artificial intelligence, programming languages, databases, encryption, passwords, computer viruses, satellites,
rockets, the space station, Mars, the sun, black holes, galaxies, comets, atoms, molecules, acids, metals, oxygen, carbon,
chemical reactions, energy, heat, sound, light, numbers, zero, fractions, prime numbers, geometry, triangles, algebra,
probability, statistics, graphs, logic, the scientific method, evolution, DNA, cells, bacteria, antibiotics, surgery,
hospitals, nurses, doctors, teachers, farmers, firefighters, engineers, lawyers, judges, police, soldiers, scientists,
artists, musicians, the piano, the guitar, drums, orchestras, opera, jazz, dance, theater, football, basketball, tennis,
swimming, chess, the Olympic Games, mountains, rivers, lakes, islands, oceans, beaches, forests, parks, gardens, farms,
the Amazon, the Sahara, the Arctic, the Himalayas, Paris, London, Tokyo, Cairo, New York, India, Brazil, Japan, Egypt,
Greece, Rome, the Middle Ages, the Renaissance, the Industrial Revolution, the Silk Road, the Vikings, the Aztecs,
knights, pirates, explorers, ships, canals, lighthouses, airports, subways, buses, roads, traffic lights, electric cars,
recycling, pollution, climate change, endangered species, national parks, the ozone layer, floods, droughts, hurricanes,
snow, fog, clouds, the seasons, spring, winter, birthdays, weddings, holidays, festivals, traditions, fashion, shoes, hats,
furniture, houses, kitchens, windows, umbrellas, toys, kites, puzzles, magic tricks, jokes, proverbs, letters, diaries
""".replace("\n", " ")
    .strip()
    .split(", ")
)

ABOUT_DOING = (
    """
How do I get better at {}?|What do I need for {}?|Give me some tips for {}.|What are the benefits of {}?
How can I teach a child about {}?|Make a simple plan for {}.|What are the first steps of {}?|Is {} difficult?
What should I avoid when it comes to {}?|How much time does {} take?|Write a checklist for {}.|Why do people enjoy {}?
What could go wrong with {}, and what can I do about it?|Write a motivating message to a friend about {}.
List the steps of {} in order.|I am nervous about {}. What would you tell me?|What is the cheapest way of {}?
""".strip()
    .replace("\n", "|")
    .split("|")
)

DOINGS = (
    """
learning a new language, learning to draw, learning to swim, playing the guitar, singing in a choir, writing a letter,
writing a resume, writing a short story, giving a speech, preparing for an exam, taking notes, reading faster,
remembering names, making new friends, asking for help, saying no, resolving a conflict, listening well, managing time,
setting goals, waking up early, falling asleep, eating healthier, baking bread, cooking pasta, making soup, packing a lunch,
planning a birthday party, planning a trip, packing a suitcase, traveling alone, camping in the woods, hiking in the
mountains, riding a horse, training a dog, adopting a cat, caring for houseplants, growing tomatoes, starting a garden,
keeping bees, painting a room, fixing a leaking faucet, cleaning a kitchen, organizing a closet, moving to a new city,
renting an apartment, buying a house, saving money, making a budget, starting a business, finding a job, preparing for an
interview, leading a team, working from home, running a meeting, learning to program, building a website, choosing a
laptop, protecting a computer, taking photographs, making a video, editing a text, doing research, learning mathematics,
solving puzzles, playing chess, meditating, stretching every day, lifting weights, riding to work, quitting smoking,
volunteering, recycling at home, saving electricity, reading to children, choosing a gift, writing a thank-you note
""".replace("\n", " ")
    .strip()
    .split(", ")
)

ABOUT_TWO = (
    """
What is the difference between {} and {}?|What do {} and {} have in common?|Which matters more, {} or {}? Explain.
Write a dialogue between an expert on {} and an expert on {}.|How are {} and {} connected?
Should a student read a book about {} or one about {}?|Write a short story with {} and {} in it.
""".strip()
    .replace("\n", "|")
    .split("|")
)


def questions(seed: int) -> Iterator[str]:
    """Without end, in random order."""
    dice = random.Random(seed)
    while True:
        kind = dice.random()
        if kind < 0.55:
            yield dice.choice(ABOUT_A_THING).format(dice.choice(THINGS))
        elif kind < 0.85:
            yield dice.choice(ABOUT_DOING).format(dice.choice(DOINGS))
        else:
            yield dice.choice(ABOUT_TWO).format(*dice.sample(THINGS, 2))
