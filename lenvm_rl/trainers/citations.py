"""What the card of a trained model cites: the paper of the algorithm, and beside it the length value model's."""

import textwrap

LENVM_CITATION = textwrap.dedent("""\
    @article{zhang2026length,
        title        = {{Length Value Model: Scalable Value Pretraining for Token-Level Length Modeling}},
        author       = {Zhen Zhang and Changyi Yang and Zijie Xia and Zhen Yang and Chengzhi Liu and Zhaotiao Weng and
                        Yepeng Liu and Haobo Chen and Jin Pan and Chenyang Zhao and Yuheng Bu and Alkesh Patel and
                        Zhe Gan and Xin Eric Wang},
        year         = 2026,
        eprint       = {arXiv:2604.27039},
    }""")
PPO_CITATION = textwrap.dedent("""\
    @article{schulman2017proximal,
        title        = {{Proximal Policy Optimization Algorithms}},
        author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
        year         = 2017,
        eprint       = {arXiv:1707.06347},
    }""")
