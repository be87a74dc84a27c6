//! What was made and how to unmake it.

use std::io;

use crate::fault;

/// A list of undo steps. Whoever makes a resource adds its step at once; dropping the list, or
/// [`run`](Undo::run)ning it, takes the steps in reverse order.
///
/// A pod keeps its list for as long as it lives: taking a pod down and giving up a pod half made are
/// the same thing.
#[derive(Default)]
pub struct Undo {
    steps: Vec<Step>,
}

type Action = Box<dyn FnMut() -> io::Result<()> + Send>;

struct Step {
    what: String,
    action: Action,
}

impl Undo {
    /// Adds a step. `what` completes "cannot …".
    pub fn push(&mut self, what: impl Into<String>, action: impl FnMut() -> io::Result<()> + Send + 'static) {
        self.steps.push(Step { what: what.into(), action: Box::new(action) });
    }

    /// Whether there is nothing to be undone.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Takes all steps. A step that fails is kept, with all that were added before it, and so can be
    /// tried again; what it was about is in the error.
    pub fn run(&mut self) -> io::Result<()> {
        while let Some(mut step) = self.steps.pop() {
            fault::point(&step.what);
            if let Err(error) = (step.action)() {
                let error = io::Error::new(error.kind(), format!("cannot {}: {error}", step.what));
                self.steps.push(step);
                return Err(error);
            }
        }
        Ok(())
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        // Nobody is left to try again: each step gets its chance.
        while let Some(mut step) = self.steps.pop() {
            if let Err(error) = (step.action)() {
                tracing::error!(%error, "cannot {}", step.what);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn recorder(undo: &mut Undo, log: &Arc<Mutex<Vec<u8>>>, number: u8) {
        let log = log.clone();
        undo.push(format!("undo {number}"), move || {
            log.lock().unwrap().push(number);
            Ok(())
        });
    }

    #[test]
    fn steps_run_in_reverse_when_the_list_is_dropped() {
        let log = Arc::default();
        let mut undo = Undo::default();
        recorder(&mut undo, &log, 1);
        recorder(&mut undo, &log, 2);
        drop(undo);
        assert_eq!(*log.lock().unwrap(), [2, 1]);
    }

    #[test]
    fn a_step_that_fails_is_tried_again_by_the_next_run() {
        let log = Arc::default();
        let mut undo = Undo::default();
        recorder(&mut undo, &log, 1);
        let mut failures = 1;
        undo.push("remove it", move || {
            failures -= 1;
            if failures == 0 { Err(io::ErrorKind::ResourceBusy.into()) } else { Ok(()) }
        });
        let error = undo.run().unwrap_err();
        assert!(error.to_string().contains("cannot remove it"), "{error}");
        assert!(log.lock().unwrap().is_empty());
        undo.run().unwrap();
        assert_eq!(*log.lock().unwrap(), [1]);
    }
}
