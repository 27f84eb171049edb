"""
A policy that remembers
=======================

An agent sees a sign at its first step only, walks on, and has to act on the sign at the
end. Three policies learn it: one without memory, the LSTM policy of sb3-contrib, and
the same with a :class:`~rim_rnn.RIM` in the LSTM's place. It needs ``pip install
'rim-rnn[tools]'``.
"""

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from rim_rnn import RIM

# %%
# The environment. What is seen after the first step is where the agent is, and nothing
# of the sign.


class Sign(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    steps = 5

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        self.sign = (options or {}).get("sign", int(self.np_random.integers(2)))
        return self.seen(), {}

    def seen(self):
        sign = 2 * self.sign - 1 if self.at == 0 else 0
        return np.array([sign, self.at / self.steps], np.float32)

    def step(self, action):
        self.at += 1
        done = self.at == self.steps
        return self.seen(), float(done and action == self.sign), done, False, {}


# %%
# sb3-contrib makes an ``nn.LSTM`` each for actor and critic. Replace them, then make
# the optimiser again, because the first one holds the parameters that went.


class RIMPolicy(RecurrentActorCriticPolicy):
    def __init__(self, observation_space, action_space, lr_schedule, **kwargs):
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
        for name in ("lstm_actor", "lstm_critic"):
            if (lstm := getattr(self, name)) is not None:
                rnn = RIM(lstm.input_size, lstm.hidden_size, lstm.num_layers)
                setattr(self, name, rnn)
        self.optimizer = self.optimizer_class(
            self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs
        )


# %%
# The rewards of the episodes, as training goes on. Who guesses gets half of them.


class Rewards(BaseCallback):
    def _on_training_start(self):
        self.rewards = []

    def _on_step(self):
        infos = self.locals["infos"]
        self.rewards += [info["episode"]["r"] for info in infos if "episode" in info]
        return True


recurrent = {"lstm_hidden_size": 32, "net_arch": []}
policies = {
    "no memory": (PPO, "MlpPolicy", {}),
    "LSTM": (RecurrentPPO, "MlpLstmPolicy", recurrent),
    "RIM": (RecurrentPPO, RIMPolicy, recurrent),
}
agents = {}
for name, (algorithm, policy, options) in policies.items():
    agent = algorithm(
        policy,
        Sign(),
        policy_kwargs=options,
        n_steps=192,
        batch_size=96,
        n_epochs=4,
        learning_rate=3e-3,
        seed=0,
        device="cpu",
    )
    callback = Rewards()
    agents[name] = agent.learn(2880, callback)
    smooth = np.convolve(callback.rewards, np.ones(50) / 50, mode="valid")
    plt.plot(range(50, len(callback.rewards) + 1), smooth, label=name)

plt.xlabel("episode")
plt.ylabel("mean reward of 50 episodes")
plt.legend()
plt.show()

# %%
# What was learnt, without chance in the actions and with either sign as often.
# ``predict`` takes the state and gives it back; its third argument, the start of an
# episode, clears it.


def mean_reward(agent):
    env, rewards = Sign(), []
    for sign in (0, 1):
        observation, _ = env.reset(options={"sign": sign})
        state, start, done = None, np.array([True]), False
        while not done:
            action, state = agent.predict(observation, state, start, deterministic=True)
            observation, reward, done, *_ = env.step(int(action))
            start = np.array([False])
        rewards.append(reward)
    return np.mean(rewards)


for name, agent in agents.items():
    print(f"{name:>9}: {mean_reward(agent):.2f}")
