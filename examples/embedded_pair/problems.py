"""Arithmetic word problems without end, made by rules, with worked answers whose numbers are right.

    python examples/embedded_pair/problems.py

prints some. A problem is a story with one to four steps; numbers stay small, since the model reads digit by digit.
"""

import random

from corpus import worked


def words(*lines: str) -> list[str]:
    return " ".join(lines).split()


NAMES = {
    "She": words(
        "Anna Carla Emma Grace Ivy Kate Mia Olga Rosa Tina Uma Wendy Natalia Natasha Betty Julie Lisa Sarah Mary Maria",
        "Alice Jenny Laura Nina Sofia Ella Gina Hannah Jane Lily Nora Susan Weng Zoe",
    ),
    "He": words(
        "Ben David Felix Henry Jack Leo Noah Paul Sam Tom Victor James Mark Peter John Bob Kevin Mike Oscar Ryan Tim",
        "Alex Daniel Frank Ian Ken Max Owen Randy Toby",
    ),
}
THINGS = words(
    "marbles apples oranges pencils books stickers cookies cards coins flowers eggs balloons candies toys stamps pens",
    "shells clips bananas cupcakes tickets stones beads muffins roses shirts bottles buttons crayons notebooks photos",
    "plants chairs cans letters bracelets peaches lemons pears boxes blocks dolls cars pages points pies fish birds",
)
GROUPS = words("bag box pack basket jar tray carton crate bundle packet")
PLACES = words("store farm school library bakery market shop garden park zoo")


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("x") else "s")


class Story:
    """A problem as it grows: sentences, the steps of its answer, and how many things there are by now."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.pronoun = rng.choice(list(NAMES))
        self.name = rng.choice(NAMES[self.pronoun])
        self.other, self.third = rng.sample([n for names in NAMES.values() for n in names if n != self.name], 2)
        self.things = rng.choice(THINGS)
        self.sentences: list[str] = []
        self.steps: list[str] = []
        self.count = 0

    def number(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def say(self, *ways: str) -> None:
        """Add a sentence, one of `ways`."""
        self.sentences.append(self.rng.choice(ways))

    def step(self, expression: str, result: int, unit: str | None = None) -> int:
        """Note `expression = result` as a step and give `result` back."""
        self.steps.append(f"{expression} = {result} {unit or self.things}")
        return result

    def document(self, *questions: str) -> dict[str, str]:
        prompt = " ".join([*self.sentences, self.rng.choice(questions)])
        return {"prompt": prompt, "answer": worked(self.steps)}

    def who(self) -> str:
        """The name, or mostly the pronoun where the name came before."""
        known = any(self.name in sentence for sentence in self.sentences)
        return self.rng.choice([self.pronoun, self.pronoun, self.pronoun, self.name]) if known else self.name


def events(rng: random.Random) -> dict[str, str]:
    """Someone has things; they become more and fewer; how many are there?"""
    story = Story(rng)
    story.count = story.number(5, 99)
    n, things, name = story.count, story.things, story.name
    story.say(
        f"{name} has {n} {things}.",
        f"{name} has {n} {things}.",
        f"{name} had {n} {things}.",
        f"There are {n} {things} in {name}'s room.",
        f"{name} starts the day with {n} {things}.",
        f"{name} collected {n} {things}.",
    )
    happenings = [more, fewer, groups_more, groups_fewer, doubled, halved]
    weights = [4, 4, 4, 2, 1, 1]
    left = rng.choices([1, 2, 3], [3, 6, 2])[0]
    while left:
        first, second = rng.choices(happenings, weights, k=2)
        clauses = [first(story)]
        left -= 1
        if left and rng.random() < 0.5:
            clauses.append(second(story))
            left -= 1
        clauses = [clause for clause in clauses if clause]
        if clauses:
            opening = rng.choice(["", "", "", "Then ", "Later, ", "The next day, "])
            who = story.who()
            story.say(f"{opening}{who.lower() if opening and who == story.pronoun else who} {' and '.join(clauses)}.")
    if not story.steps:
        return events(rng)
    return story.document(
        f"How many {things} does {name} have now?",
        f"How many {things} does {story.pronoun.lower()} have now?",
        f"How many {things} are there now?",
        f"How many {things} does {name} have left?",
        f"How many {things} does {story.pronoun.lower()} have in the end?",
        f"How many {things} does {name} have in total?",
    )


def more(story: Story) -> str:
    n = story.number(2, 60)
    story.count = story.step(f"{story.count} + {n}", story.count + n)
    extra = f"{n} more {story.things}" if story.rng.random() < 0.5 else f"{n} {story.things}"
    return story.rng.choice(
        [
            f"buys {extra}",
            f"finds {extra}",
            f"gets {extra} from {story.other}",
            f"wins {extra}",
            f"receives {extra} as a gift",
            f"buys {extra} at the {story.rng.choice(PLACES)}",
        ]
    )


def fewer(story: Story) -> str:
    if story.count < 4:
        return more(story)
    n = story.number(2, min(story.count - 1, 60))
    story.count = story.step(f"{story.count} - {n}", story.count - n)
    some = f"{n} {story.things}" if story.rng.random() < 0.6 else f"{n} of them"
    return story.rng.choice(
        [
            f"gives {some} to {story.other}",
            f"gives {some} to {story.third}",
            f"gives {story.other} {some}",
            f"loses {some}",
            f"sells {some}",
            f"gives away {some}",
            f"uses {some}",
        ]
    )


def groups_more(story: Story) -> str:
    k, n = story.number(2, 9), story.number(2, 15)
    product = story.step(f"{k} * {n}", k * n)
    story.count = story.step(f"{story.count} + {product}", story.count + product)
    group, verb = story.rng.choice(GROUPS), story.rng.choice(["buys", "buys", "gets", "finds", "brings"])
    return story.rng.choice(
        [
            f"{verb} {k} {plural(group)} with {n} {story.things} each",
            f"{verb} {k} {plural(group)} of {n} {story.things} each",
            f"{verb} {k} {plural(group)} with {n} {story.things} in each {group}",
            f"{verb} {k} more {plural(group)} of {n} {story.things}",
            f"{verb} {n} {story.things} a day for {k} days",
        ]
    )


def groups_fewer(story: Story) -> str:
    if story.count < 12:
        return groups_more(story)
    k = story.number(2, min(9, story.count // 4))
    n = story.number(2, max(2, min(12, (story.count - 1) // k)))
    product = story.step(f"{k} * {n}", k * n)
    story.count = story.step(f"{story.count} - {product}", story.count - product)
    return story.rng.choice(
        [
            f"gives {n} {story.things} to each of {k} friends",
            f"gives {k} friends {n} {story.things} each",
            f"sells {k} {plural(story.rng.choice(GROUPS))} with {n} {story.things} each",
            f"uses {n} {story.things} a day for {k} days",
        ]
    )


def doubled(story: Story) -> str:
    if story.count > 150:
        return fewer(story)
    story.count = story.step(f"{story.count} * 2", story.count * 2)
    return story.rng.choice([f"doubles the number of {story.things}", f"makes that twice as many {story.things}"])


def halved(story: Story) -> str:
    if story.count % 2:
        return more(story)
    story.count = story.step(f"{story.count} / 2", story.count // 2)
    return story.rng.choice(
        [
            f"gives half of the {story.things} to {story.other}",
            "loses half of them",
            f"sells half of the {story.things}",
        ]
    )


def compared(rng: random.Random) -> dict[str, str]:
    """One has so many things, another more, fewer or a multiple; how many has the other, or have all together?"""
    story = Story(rng)
    n, things, name, other = story.number(4, 60), story.things, story.name, story.other
    story.say(f"{name} has {n} {things}.", f"{name} sold {n} {things}.", f"{name} picked {n} {things}.")
    verb = story.sentences[0].split()[1]
    kind = rng.randrange(4)
    if kind == 0:
        m = story.number(2, 40)
        story.say(f"{other} {verb} {m} more {things} than {name}.", f"{other} {verb} {m} more {things}.")
        count = story.step(f"{n} + {m}", n + m)
    elif kind == 1:
        m = story.number(2, n - 1)
        story.say(f"{other} {verb} {m} fewer {things} than {name}.", f"{other} {verb} {m} less than {name}.")
        count = story.step(f"{n} - {m}", n - m)
    elif kind == 2:
        m = story.number(2, 5)
        times = {2: "twice", 3: "three times", 4: "four times", 5: "5 times"}[m]
        story.say(f"{other} {verb} {times} as many {things} as {name}.", f"{other} {verb} {times} as many.")
        count = story.step(f"{n} * {m}", n * m)
    else:
        n -= n % 2
        story.sentences = [f"{name} {verb} {n} {things}.", f"{other} {verb} half as many {things} as {name}."]
        count = story.step(f"{n} / 2", n // 2)
    do, base = ("do", "have") if verb == "has" else ("did", verb.replace("sold", "sell").replace("picked", "pick"))
    if rng.random() < 0.3:
        return story.document(f"How many {things} {'does' if do == 'do' else do} {other} {base}?")
    total = story.step(f"{n} + {count}", n + count)
    if rng.random() < 0.3:
        k = story.number(2, 30)
        story.say(f"{story.third} {verb} {k} {things}.")
        story.step(f"{total} + {k}", total + k)
        return story.document(
            f"How many {things} {do} they {base} in total?", f"How many {things} {do} the three {base}?"
        )
    return story.document(
        f"How many {things} {do} they {base} in total?",
        f"How many {things} {do} they {base} altogether?",
        f"How many {things} {do} {name} and {other} {base} together?",
    )


def shopping(rng: random.Random) -> dict[str, str]:
    """Things of a price; what do they cost, and what is left of the money?"""
    story = Story(rng)
    k, price, things, name = story.number(2, 9), story.number(2, 15), story.things, story.name
    total = story.step(f"{k} * {price}", k * price, "dollars")
    story.say(
        f"{name} buys {k} {things} that cost ${price} each.",
        f"{name} bought {k} {things} for ${price} each.",
        f"Each of the {things} costs ${price}. {name} buys {k} of them.",
        f"{name} buys {k} {things}. They cost ${price} each.",
    )
    pronoun = story.pronoun.lower()
    if rng.random() < 0.4:
        other = rng.choice(THINGS)
        k, price = story.number(2, 6), story.number(2, 12)
        story.say(f"{story.who()} also buys {k} {other} for ${price} each.")
        second = story.step(f"{k} * {price}", k * price, "dollars")
        total = story.step(f"{total} + {second}", total + second, "dollars")
    ending = rng.random()
    if ending < 0.4:
        return story.document(
            f"How much does {name} pay?", f"How much does {pronoun} spend?", "How much money does it cost in total?"
        )
    if ending < 0.55:
        off = story.number(1, total - 1) if total < 20 else story.number(2, 15)
        story.say(f"{story.who()} gets a discount of ${off}.")
        story.step(f"{total} - {off}", total - off, "dollars")
        return story.document(f"How much does {name} pay?", f"How much does {pronoun} spend?")
    paid = rng.choice([n for n in (20, 50, 100, 150, 200, total + story.number(1, 40)) if n > total])
    story.step(f"{paid} - {total}", paid - total, "dollars")
    if rng.random() < 0.5:
        story.sentences.insert(0, f"{name} has ${paid}.")
        return story.document(f"How much money does {name} have left?", "How much money is left?")
    story.say(f"{story.who()} pays with ${paid}.")
    return story.document(f"How much change does {name} get?", f"How much money does {pronoun} get back?")


def rates(rng: random.Random) -> dict[str, str]:
    """So many an hour, day or week for so long."""
    story = Story(rng)
    n, k, name = story.number(2, 20), story.number(2, 9), story.name
    period = rng.choice(["hour", "day", "week"])
    verb, unit = rng.choice(
        [("earns", "dollars"), ("reads", "pages"), ("makes", story.things), ("sells", story.things), ("runs", "miles")]
    )
    amount = f"${n}" if unit == "dollars" else f"{n} {unit}"
    base = verb[:-1]
    story.say(f"{name} {verb} {amount} every {period}.", f"{name} {verb} {amount} a {period}.")
    total = story.step(f"{n} * {k}", n * k, unit)
    ask = "How much money" if unit == "dollars" else f"How many {unit}"
    if rng.random() < 0.5:
        return story.document(
            f"{ask} does {name} {base} in {k} {period}s?",
            f"{ask} will {story.pronoun.lower()} {base} in {k} {period}s?",
        )
    story.say(f"{story.who()} does this for {k} {period}s.")
    m = story.number(2, 30)
    if rng.random() < 0.5:
        story.say(f"After that, {story.who().replace(story.pronoun, story.pronoun.lower())} {verb} {m} more.")
        story.step(f"{total} + {m}", total + m, unit)
        return story.document(f"{ask} does {name} {base} in total?", f"{ask} does {name} {base}?")
    other = story.number(2, 20)
    story.say(f"{story.other} {verb} {'$' if unit == 'dollars' else ''}{other} every {period} for {k} {period}s.")
    second = story.step(f"{other} * {k}", other * k, unit)
    story.step(f"{total} + {second}", total + second, unit)
    return story.document(f"{ask} do they {base} in total?", f"{ask} do they {base} together?")


def shared(rng: random.Random) -> dict[str, str]:
    """Things that are shared out evenly, perhaps after some were put aside."""
    story = Story(rng)
    k, each, things, name = story.number(2, 9), story.number(2, 15), story.things, story.name
    total, aside = k * each, 0
    if rng.random() < 0.5:
        aside = story.number(2, 20)
        story.step(f"{total + aside} - {aside}", total)
    story.say(
        f"{name} has {total + aside} {things}.",
        f"There are {total + aside} {things}.",
        f"{name} baked {total + aside} {things}.",
    )
    if aside:
        story.say(f"{story.who()} keeps {aside} of them.", f"{story.who()} gives {aside} {things} to {story.other}.")
    story.step(f"{total} / {k}", each)
    rest = "the rest" if aside else "them"
    group = rng.choice(GROUPS)
    if rng.random() < 0.5:
        story.say(f"{story.who()} shares {rest} equally among {k} friends.", f"{k} children share {rest} equally.")
        return story.document(f"How many {things} does each of them get?", f"How many {things} does each get?")
    story.say(f"{story.who()} puts {rest} into {k} {plural(group)} evenly.")
    return story.document(f"How many {things} are in each {group}?")


def sums(rng: random.Random) -> dict[str, str]:
    """Bare arithmetic: drill for the digits."""
    kind = rng.choice("++--**/")
    a, b = {"*": (rng.randint(2, 12), rng.randint(2, 20)), "/": (rng.randint(2, 12), rng.randint(2, 20))}.get(
        kind, (rng.randint(2, 199), rng.randint(2, 99))
    )
    if kind == "/":
        a = a * b
    if kind == "-" and a < b:
        a, b = b, a
    if kind == "*" and rng.random() < 0.5:
        a, b = b, a
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[kind]
    return {"prompt": f"What is {a} {kind} {b}?", "answer": worked([f"{a} {kind} {b} = {result}"])}


KINDS = {events: 45, compared: 13, shopping: 12, rates: 9, shared: 9, sums: 12}


def problem(rng: random.Random) -> dict[str, str]:
    """`{"prompt": ..., "answer": ...}` of a random problem."""
    return rng.choices(list(KINDS), list(KINDS.values()))[0](rng)


def problems(count: int, seed: int) -> list[dict[str, str]]:
    """`count` problems; other seeds give other problems."""
    rng = random.Random(seed)
    return [problem(rng) for _ in range(count)]


if __name__ == "__main__":
    for shown in problems(30, seed=0):
        print(f"{shown['prompt']}\n{shown['answer']}\n")
