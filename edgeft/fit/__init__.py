"""What a model needs and how fast a board runs it: shapes, memory, speed, and the cost of making it.

Every number here is a prediction. Nothing in this package imports the pipeline, numpy or torch.
"""
