"""The verb `gate`: the safety gate on two recorded runs, or on predictions from anywhere."""
