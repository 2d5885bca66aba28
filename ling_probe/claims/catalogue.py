"""The claims made of Ling 2.0's routing, each with what it rests on."""

from collections.abc import Mapping
from dataclasses import dataclass

from ling_probe.analysis.asking import Answer
from ling_probe.analysis.decoding import LEAST_EFFECT as LEAST_GAIN
from ling_probe.analysis.information import LEAST_EFFECT as LEAST_BITS
from ling_probe.analysis.overlap import LEAST_EFFECT as LEAST_OVERLAP
from ling_probe.analysis.prediction import LEAST_EFFECT as LEAST_SAVED
from ling_probe.analysis.similarity import LEAST_GAP
from ling_probe.claims import parts, studies
from ling_probe.claims.claim import Claim
from ling_probe.claims.evidence import ADAPTATION, COST, REROUTING
from ling_probe.claims.parts import Asked
from ling_probe.run import Run


@dataclass(frozen=True, kw_only=True)
class Question:
    """A claim before it is answered; fields as those of `Claim`."""

    key: str
    statement: str
    measure: str
    null: str
    would_change: str
    command: str
    asked: tuple[Asked, ...]

    def claim(self, number: int, run: Run, answers: Mapping[str, Answer]) -> Claim:
        """Answered from tables and refusals by source."""
        return Claim(
            number=number, key=self.key, statement=self.statement, measure=self.measure, null=self.null,
            would_change=self.would_change, command=self.command,
            parts=tuple(each.part(answers.get(each.source), run) for each in self.asked),
        )  # fmt: skip


CAUSAL = "ling-probe claims RUN --causal"

QUESTIONS = (
    Question(
        key="fixed_compute",
        statement="Compute per token stays fixed while capacity grows with the number of experts.",
        measure=(
            "Choices over tokens in every layer, from the recorded ids: K. FLOPs a token in closed form with E and with 2E "
            "experts at the same K: they may differ by the routers' rows alone, 2·D an expert and layer."
        ),
        null=(
            "None: counts are exact. The claim is of E at one K: from ling-mini-2.0 to ling-1t both grow, parameters 61 "
            "times and FLOPs a token 45 times. What loss the capacity buys is another question, of models trained at several "
            "sizes."
        ),
        would_change=(
            "A token that runs more or fewer than K experts in some layer, or a cost that grows with E beyond the router."
        ),
        command="ling-probe cost ling-1t",
        asked=(
            Asked(source="expert_load", statement="Every token runs the same number of experts.", judged=parts.experts_a_token),
            Asked(
                source=COST, statement="Doubling the experts adds only the routers' rows.", judged=studies.doubled_experts,
                decides=False,
            ),
        ),
    ),
    Question(
        key="no_few_experts",
        statement="The work does not rest on a few experts.",
        measure=(
            "Share of choices on the K busiest experts of a layer over their even share K/E, in the most concentrated layer, "
            "and the share of experts never chosen. Beside them entropy, Gini, MaxVio, and the loss without the busiest."
        ),
        null="A simulated router without preference, limited to groups as the model's is, after as many tokens.",
        would_change=(
            "A layer whose K busiest experts surely carry twice their even share, or one expert in twenty dead. Narrow text "
            "looks skewed on any router: capture mixed text before blaming the model."
        ),
        command=CAUSAL,
        asked=(
            Asked(source="expert_load", statement="The K busiest do less than twice their share.", judged=parts.busiest),
            Asked(source="load_balance", statement="Next to no expert is dead.", judged=parts.dead_experts),
            Asked(
                source="load_balance", statement="Loads are less even than without preference.", judged=parts.evenness,
                decides=False,
            ),
            Asked(
                source=REROUTING, statement="The busiest experts are no harder to miss than others.",
                judged=studies.busiest_excluded, decides=False,
            ),
        ),
    ),
    Question(
        key="shallow_less_even",
        statement="Shallow routed layers are less balanced than deep ones.",
        measure="Mean Gini of the load over the shallow half of the routed layers less that over the deep half.",
        null="No difference; bounds are those of both halves at their farthest, so never too narrow.",
        would_change=(
            "A difference whose interval lies above 0, on mixed text and in a model with more than a handful of layers."
        ),
        command="ling-probe analyze RUN load_balance",
        asked=(
            Asked(source="load_balance", statement="Shallow layers are less even.", judged=parts.shallow_less_even),
        ),
    ),
    Question(
        key="meaning",
        statement="Experts are chosen by meaning, not by the token alone.",
        measure=(
            "Bits a chosen expert's prediction saves when the token before is known beside the token, on held-out sequences; "
            "overlap of two occurrences of a token after the same and after other tokens; bits the experts tell about the "
            "step label (or the family), given the token and the one before."
        ),
        null=(
            "The token alone; then the token and the one before, with labels shuffled over whole steps inside each problem. "
            "Any attention, trained or not, mixes in the context: the first two parts are necessary, not sufficient."
        ),
        would_change="More problems where a part cannot be told; a layer in which the token alone decides would refute it.",
        command="ling-probe analyze RUN routing_information routing_prediction token_overlap",
        asked=(
            Asked(
                source="routing_prediction", statement="The token before predicts the choice beyond the token, in every layer.",
                judged=parts.worth(parts.found, LEAST_SAVED),
            ),
            Asked(
                source="token_overlap", statement="The same token is routed more alike after the same token.",
                judged=parts.worth(parts.context_of_a_token, LEAST_OVERLAP),
            ),
            Asked(
                source="routing_information", statement="The experts tell what a step does beyond the words around.",
                judged=parts.worth(parts.beyond_neighbours, LEAST_BITS),
            ),
        ),
    ),
    Question(
        key="follows_steps",
        statement="Routing follows the steps of the reasoning.",
        measure=(
            "Preference for a kind of step at equal tokens in the same third of the solution (log2 ratio); likeness of steps "
            "of one kind, at equal tokens and place (cosine); bits about the kind beyond token and position; bits a decoder "
            "gains from routing beyond words and place, where these leave any."
        ),
        null=(
            "Labels shuffled over whole steps inside each problem, and in the same third; preferences picked on one half of "
            "the problems must hold on the other; the decoder is compared with itself without routing, on held-out problems."
        ),
        would_change=(
            "More problems, labels the words do not give away, or another way to cut steps; shuffled labels must lose it."
        ),
        command="ling-probe analyze RUN label_specialisation step_similarity routing_information label_decoding",
        asked=(
            Asked(
                source="label_specialisation", statement="Some expert prefers a kind of step beyond its words and place.",
                judged=parts.replicated,
            ),
            Asked(
                source="step_similarity", statement="Steps of one kind are routed alike beyond their words and place.",
                judged=parts.worth(parts.found, LEAST_GAP),
            ),
            Asked(
                source="routing_information", statement="The experts tell the kind of step beyond token and position.",
                judged=parts.about_labels(parts.worth(parts.found, LEAST_BITS)),
            ),
            Asked(
                source="label_decoding", statement="Routing adds to what words and place tell of the kind of step.",
                judged=parts.about_labels(parts.worth(parts.room_to_decode, LEAST_GAIN)),
            ),
        ),
    ),
    Question(
        key="errors",
        statement="Errors of reasoning show in the routing.",
        measure=(
            "AUROC of held-out solutions, right against wrong of the same family, with routing beside length, loss and "
            "words, less that without routing."
        ),
        null="Both scores of each solution swapped at random; length, loss and words are in both.",
        would_change="More wrong solutions: ten of each kind in a family are the least, some hundred are needed to tell.",
        command="ling-probe capture MODEL stepbench --split longer --generate 300 --out RUN",
        asked=(
            Asked(
                source="answer_prediction", statement="Routing tells wrong solutions beyond length, loss and words.",
                judged=parts.found,
            ),
            Asked(
                source="correctness_specialisation", statement="Some expert is chosen more or less in wrong solutions.",
                judged=parts.found, decides=False,
            ),
        ),
    ),
    Question(
        key="causal",
        statement="What a step is routed to matters for that step.",
        measure=(
            "Rise of the loss in steps of a kind less that in other steps of the same problems, when the experts that this "
            "kind prefers are changed; and under the experts that the same tokens chose in steps of another kind."
        ),
        null=(
            "The same change to experts of the same layers and like load, drawn many times; for another kind's experts, "
            "those of the same tokens in steps of the same kind. Corrected over changes and kinds."
        ),
        would_change=(
            "Effects on problems other than those the experts were picked on, more draws, or generation in place of reading."
        ),
        command=CAUSAL,
        asked=(
            Asked(
                source="causal_effects", statement="Changing a step's experts costs that step more than changing like experts.",
                judged=studies.worth_having,
            ),
        ),
    ),
    Question(
        key="groups_cost_nothing",
        statement="The limit to groups costs nothing.",
        measure="Loss on given solutions with the group limit off less that with it on, paired by problem.",
        null=(
            "The model's own router on the same solutions; it would refute the claim if the loss fell by a hundredth of "
            "itself."
        ),
        would_change="A loss that surely falls once the limit is off; a model trained without it is the fuller comparison.",
        command=CAUSAL,
        asked=(
            Asked(
                source=REROUTING, statement="Without the group limit the loss does not fall.",
                judged=studies.same_loss("no-groups", named="Choosing from all groups", harm_alone=True),
            ),
            Asked(
                source="choice_reasons", statement="Most choices follow affinity, not bias or groups.", judged=parts.found,
                decides=False,
            ),
        ),
    ),
    Question(
        key="bias_for_balance",
        statement="The router's bias serves balance alone.",
        measure=(
            "Loss on given solutions without the bias less that with it, paired by problem; rank correlation of an expert's "
            "bias and its mean score."
        ),
        null=(
            "The model's own router on the same solutions; no correlation. A bias that balances lifts experts of low "
            "affinity."
        ),
        would_change="A loss that moves by more than a hundredth of itself once the bias is gone: then it chooses, too.",
        command=CAUSAL,
        asked=(
            Asked(
                source=REROUTING, statement="Without the bias the loss is the same.",
                judged=studies.same_loss("no-bias", named="Choosing by score alone"),
            ),
            Asked(
                source="expert_reasons", statement="The bias is higher where affinity is lower.", judged=parts.preferring_bias,
            ),
        ),
    ),
    Question(
        key="every_activation",
        statement="Every activated expert helps.",
        measure=(
            "Loss on given solutions when the expert of one rank of weight is left out everywhere, the other weights as they "
            "were, for each rank 1 to K; the rank that costs least decides."
        ),
        null="No rise: the model's own router on the same solutions, paired by problem.",
        would_change="A rank whose absence surely costs less than a hundredth of the loss.",
        command=CAUSAL,
        asked=(
            Asked(source=REROUTING, statement="Leaving out any rank raises the loss.", judged=studies.every_slot),
            Asked(
                source=REROUTING, statement="One expert fewer, weights renewed, is as good.",
                judged=studies.fewer_experts, decides=False,
            ),
        ),
    ),
    Question(
        key="router_alone",
        statement="A model can be adapted to a task by its routers alone.",
        measure="Share of right answers on the task after adapting the routers alone, less that before.",
        null="No difference, as of two independent samples (Newcombe's interval); other tasks are judged beside it.",
        would_change="Another task, more steps, or the same number of other parameters (--tune experts) doing as well.",
        command=(
            "ling-probe adapt MODEL stepbench --split longer --family arithmetic --out FOLDER; ling-probe claims RUN "
            "--adapted FOLDER"
        ),
        asked=(
            Asked(source=ADAPTATION, statement="More answers are right after than before.", judged=studies.adapted_answers),
            Asked(
                source=ADAPTATION, statement="No other task loses by it.", judged=studies.other_tasks_kept, decides=False,
            ),
        ),
    ),
)  # fmt: skip
"""In the order they are told."""
