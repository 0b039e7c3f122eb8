"""The science of the project: decay mechanisms and the model around them.

It runs on a CPU, can be imported alone, and knows nothing of Ray, MLflow or DeepSpeed.
"""
