"""What a person looks at: MLflow runs, fed from the step logs by the driver alone. The only folder that imports MLflow."""
