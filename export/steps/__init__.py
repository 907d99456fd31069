"""Steps of a model on an engine's own inputs, beside the reference's own run; `gatework.export.layerwise` has their order."""
