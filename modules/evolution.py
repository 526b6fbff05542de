"""Evolution that scores nothing twice: what the space search runs, and steps that the subnet search shares."""
from collections import deque


def walk_to_new(step, start, seen, max_steps=50):
    """step(start), step of that, … until the string of what is reached is not in the set `seen`, else None.

    So where all neighbours of a good parent were scored, its neighbours' neighbours come next.
    """
    individual = start
    for _ in range(max_steps):
        individual = step(individual)
        if str(individual) not in seen:
            return individual
    return None


def regularized_evolution(initial, random_individual, mutations, score, rng, total, population_size=500,
                          parent_sample_size=125):
    """Aging evolution (Real et al., AAAI 2019) that scores `total` different individuals; yields (individual, score).

    score(individual) is a tuple whose first number counts, the larger the better. initial: first individuals;
    random_individual() fills the population up. Each step the best of `parent_sample_size` random individuals is the
    parent, each of `mutations` (functions of an individual) gives a child, and the oldest die. A child that was scored
    before is mutated on; where that finds nothing new it is a random individual. total must not exceed the number of
    individuals there are. rng: random.Random.
    """
    seen, population, scored = set(), deque(maxlen=population_size), 0

    def new_random():
        individual = None
        while individual is None:
            individual = walk_to_new(lambda _: random_individual(), None, seen)
        return individual

    initial = iter(initial)
    while scored < total:
        if scored < population_size:
            children = [lambda: next(initial, None)]
        else:
            parent = max(rng.sample(list(population), min(parent_sample_size, len(population))),
                         key=lambda entry: entry[1][0])[0]
            children = [lambda mutate=mutate: walk_to_new(mutate, parent, seen) for mutate in mutations]
        for child in children[:total - scored]:
            individual = child()
            if individual is None:
                individual = new_random()
            seen.add(str(individual))
            population.append((individual, score(individual)))
            scored += 1
            yield population[-1]
