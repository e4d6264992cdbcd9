"""An own loop over an own torch module: a small regression learned without a gradient.

    python examples/own_loop.py

Prints the loss every 20 generations; it falls from 5 to below 0.1 in two seconds.
"""

import esfast  # first: torch's threads then leave busy cores alone (docs/engines.md)

# isort: split
import torch

torch.manual_seed(0)
inputs = torch.randn(256, 4)
targets = inputs @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.3
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


@torch.no_grad()
def loss() -> float:
    return torch.nn.functional.mse_loss(model(inputs).squeeze(1), targets).item()


es = esfast.EvolutionStrategy(model, sigma=0.05, alpha=0.05, population_size=32, antithetic=True)
for generation in range(200):
    rewards = [-loss() for member in es.population()]  # inside the loop the model is that member
    es.step(rewards)
    if generation % 20 == 19:
        print(f"generation {generation + 1:3}  loss {loss():.3f}")
