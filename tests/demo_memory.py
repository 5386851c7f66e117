"""MiB by which resident memory grows over 16 more generations of every kind of work in the demo, after the first 6."""

import psutil
import torch

import dspark_hf
from dspark_hf.demo import chat, load, race, rounds
from dspark_hf.demo.session import DemoSession, Stop
from dspark_hf.serving.memory import keep_together
from dspark_hf.serving.products import keep_few


def generations(session: DemoSession, count: int) -> None:
    prompt = [{"role": "user", "content": race.EXAMPLES[0]}]
    for i in range(count):
        *_, _ = race.race(session, session.encode(prompt), 64, 0.0, Stop())
        *_, _ = rounds.run(session, session.encode(prompt), 64, 1.0, Stop())
        *_, _ = chat.answer(session, prompt, 64, 1.0, None, Stop())
        events = load.run(session, load.Level(4), Stop())
        turns = (event for event in events if isinstance(event, load.Turn))
        for _ in range(1 + i % 4):
            next(turns)
        events.close()


def resident() -> float:
    return psutil.Process().memory_info().rss / 2**20


def main() -> None:
    keep_few()
    keep_together()
    load.TURN_SECONDS = 0.2
    session = DemoSession(*dspark_hf.embedded_pair(dtype=torch.float32))
    # By the first 6 the manager then keeps as many texts of ended requests as it may, which takes hundreds of answers
    # otherwise: 90 MiB of them.
    kept = session.manager.loop.texts
    kept.room = 500
    generations(session, 6)
    assert sum(map(len, kept.texts)) > kept.room / 2
    before = resident()
    generations(session, 16)
    print(resident() - before)
    session.manager.stop(hard_stop=True)


if __name__ == "__main__":
    main()
