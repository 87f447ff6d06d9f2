"""How the bundled models were made, measured and broken. The product needs none of it.

    python -m lab.bundled …      makes models like the bundled ones from photos, by all stages
    python -m lab.prior …        trains the bundled model's prior from photos alone
    python -m lab.ablation …     tables: the stages of the method, and what each part of the training is worth
    python -m lab.linearsr …     LinearSR: its experts' losses, and the table of both systems
    python -m lab.profile …      parameters, multiply-accumulates and latency by stage
    python -m lab.stability …    how much degradations change latents, beside pixels
    python -m lab.bench …        where the time goes, plain against fast and against diffusers
    python -m lab.gpu …          evidence from an NVIDIA GPU
    python -m lab.faults …       broken inputs, killed processes, bad disks
"""
