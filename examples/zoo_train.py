"""RL Zoo's training in your own script: register Dreamer first, the rest is rl_zoo3.

python examples/zoo_train.py --algo dreamer --env Pendulum-v1 -conf zoo_hyperparams/dreamer.yml
"""

import sb3_dreamer.zoo

if __name__ == "__main__":  # --vec-env subproc imports this file again in each of its processes
    sb3_dreamer.zoo.register()
    from rl_zoo3.train import train

    train()
