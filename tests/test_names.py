"""The public names, in full: what a user imports today keeps its name."""

import pytest

import bilinear_ops as bo

NAMES = {
    bo: """
        ActiveInteractions Directions InteractionMoments TopInteractions
        active_interactions eigen_form interaction_diagonal interaction_entries interaction_matrices
        interaction_moments interaction_topk iter_interaction_matrices layer_inner neuron_gram pack_symmetric
        quadratic_form unpack_symmetric
        gate gated_bilinear gated_mlp gates stochastic_gated_mlp
        faithfulness_loss importance_minimality lower_leaky_hard_sigmoid rank1_accumulate rank1_linear rank1_sparse
        stochastic_delta stochastic_mask stochastic_rank1_linear upper_leaky_hard_sigmoid
        component_gates frequency_penalty pooled_faithfulness_loss smooth_l0 subset_routing
        analysis init integrations nn plots reference warmup
    """,
    bo.analysis: """
        BestQuadratic BiasTerms CPDecomposition EigenPairs EvenOdd Explanation HOSVD JointDiagonalisation
        QuadraticLayer Reexpression SparseDecomposition StrongestDirections TruncationCorrelation VirtualLayer
        adversarial_masks augment_biases best_quadratic bias_terms cp_decompose effective_rank even_odd_split explain
        gated_interactions glu_gates hosvd hoyer interaction_clusters interaction_eigh joint_diagonalise kept_strength
        layer_distance layer_similarity layer_weights load_chunks loss_added reexpress run_in_chunks sparse_decompose
        strength strongest_directions truncate truncation_correlation truncation_curve virtual_interactions
    """,
    bo.nn: """
        GatedBilinear GatedMLP Rank1Embedding Rank1Linear
        AdversarialSource FrequencyPenalty Gates Importances MixedWeights Transcoder route routed_gated_mlp
        Activations anneal_beta bilinearise_ swish_
    """,
    bo.init: "expand_gated_mlp expand_mlp expand_rank1",
    bo.plots: """
        cluster distribution eigenplane eigenvectors explanation interactions scatter similarity spectrum truncation
    """,
}


@pytest.mark.parametrize("module", NAMES, ids=lambda module: module.__name__)
def test_public_names(module):
    assert sorted(module.__all__) == sorted(NAMES[module].split())
    for name in module.__all__:
        assert hasattr(module, name)
