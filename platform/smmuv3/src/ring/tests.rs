//! Every interleaving, by loom, of small queues with few producers; and one thread's walk around larger ones.
//!
//! Loom's own words and cells are used, so a slot that is written while the hardware may still read it, or read before it was
//! written, is a data race that loom reports; so are two at the registers.
//!
//! Seen red: no fence before the look at the bell, and none before the look for what was posted; no such look, or not known that there
//! is something to look for; a bell that is given back as if nobody had come; the short way opened again though something has not been
//! told; a disturbance that the short way does not notice; and made `Relaxed`, each by itself: taking the bell on either way, giving it
//! back on either way, both orders of the marks, both looks at `consumed` before a claim, the note of it, the look at it by whoever waits,
//! and the one before an index is read.

use super::*;
use core::sync::atomic::Ordering::AcqRel;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64};
use loom::thread;
use std::vec;

word!(AtomicU64, loom::sync::atomic::fence);

/// A queue, its memory, and the hardware's two registers.
struct Queue {
    ring: Ring<AtomicU64>,
    slots: Vec<UnsafeCell<u64>>,
    prod: AtomicU32,
    cons: AtomicU32,
    /// Who has the bell has this.
    place: UnsafeCell<u64>,
}

impl Queue {
    fn new(log2: u32) -> Arc<Self> {
        let size = QueueSize::new(log2);
        let slots = (0..size.entries()).map(|_| UnsafeCell::new(0)).collect();
        let ring = Ring::new(size, true).unwrap();
        let place = UnsafeCell::new(0);
        Arc::new(Self { ring, slots, prod: AtomicU32::new(0), cons: AtomicU32::new(0), place })
    }

    fn tell(&self, index: u32) {
        // SAFETY: loom checks that nobody else is at it.
        #[allow(unsafe_code)]
        self.place.with_mut(|count| unsafe { *count += 1 });
        let before = self.prod.swap(index, AcqRel);
        let size = self.ring.size;
        assert!(size.distance(before, index) <= size.entries(), "the index went back: {before} to {index}");
    }

    fn write(&self, run: Range<u64>, value: u64) {
        for position in run {
            // SAFETY: loom checks that nobody else is at it.
            #[allow(unsafe_code)]
            self.slots[self.ring.slot(position)].with_mut(|slot| unsafe { *slot = value });
        }
    }

    /// Posts up to `count` entries, as a command is that nobody waits for.
    fn put(&self, count: u64, value: u64) -> Range<u64> {
        if let Some(run) = self.alone(count, value) {
            return run;
        }
        self.posted(count, value)
    }

    /// [`Self::put`] on the way of a crowd.
    fn posted(&self, count: u64, value: u64) -> Range<u64> {
        let run = self.ring.post(count).unwrap();
        if !run.is_empty() {
            self.write(run.clone(), value);
            self.ring.finish(run.clone());
        }
        self.ring.ring(|index| self.tell(index));
        run
    }

    /// [`Self::put`] on the short way, if it is open.
    fn alone(&self, count: u64, value: u64) -> Option<Range<u64>> {
        let run = self.ring.claim_alone(self.ring.next(), count)?;
        self.ring.telling(run.end);
        self.write(run.clone(), value);
        self.tell(self.ring.index(run.end));
        if !self.ring.leave_alone(run.end) {
            self.leave(1, self.ring.behind());
        }
        Some(run)
    }

    fn leave(&self, runs: u64, behind: u64) {
        if !self.ring.leave(runs, behind) {
            self.ring.ring(|index| self.tell(index));
        }
    }

    /// Puts one entry on the way of a crowd and waits until it is known to have been consumed, which the hardware does when it is
    /// looked at. Lingers once at most.
    fn put_and_wait(&self, value: u64) -> u64 {
        let run = self.ring.claim(1).unwrap();
        self.write(run.clone(), value);
        self.ring.finish(run.clone());
        let mut linger = true;
        while self.ring.consumed() < run.end {
            match self.ring.turn(run.end) {
                Turn::Linger if linger => linger = false,
                Turn::Linger | Turn::Go { .. } => self.visit(&run),
                Turn::Wait => {}
            }
            thread::yield_now();
        }
        run.end
    }

    /// Goes to the registers, if nobody is there.
    fn visit(&self, own: &Range<u64>) {
        if self.ring.take_bell() {
            let runs = self.ring.tell_written(own, |index| self.tell(index));
            let mut behind = 0;
            let looked = self.ring.follow(|| {
                self.consume();
                behind = self.ring.behind();
                self.cons.load(Acquire)
            });
            assert!(looked.is_ok());
            self.leave(runs, behind);
        }
    }

    fn follow(&self) -> Result<u64, BadIndex> {
        self.ring.follow(|| self.cons.load(Acquire))
    }

    /// What the hardware does: consumes what it has been told of.
    fn consume(&self) -> Vec<u64> {
        let size = self.ring.size;
        let (prod, mut cons) = (self.prod.load(Acquire), self.cons.load(Relaxed));
        let mut seen = Vec::new();
        while !size.is_empty(prod, cons) {
            // SAFETY: loom checks that nobody writes it.
            #[allow(unsafe_code)]
            seen.push(self.slots[size.slot(cons)].with(|slot| unsafe { *slot }));
            cons = size.advance(cons, 1);
            self.cons.store(cons, Release);
        }
        seen
    }
}

fn explore(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(f);
}

#[test]
fn whatever_the_interleaving_every_run_reaches_the_hardware_whole_and_once() {
    explore(3, || {
        let queue = Queue::new(2);
        let other = Arc::clone(&queue);
        let producer = thread::spawn(move || other.put(2, 7));
        let mine = queue.put(2, 9);
        let theirs = producer.join().unwrap();
        assert_eq!(queue.ring.told(), 4);
        let seen = queue.consume();
        let expected = if mine.start < theirs.start { vec![9, 9, 7, 7] } else { vec![7, 7, 9, 9] };
        assert_eq!(seen, expected);
    });
}

#[test]
fn a_full_queue_is_never_overwritten_while_the_hardware_reads() {
    explore(2, || {
        let queue = Queue::new(1);
        assert_eq!(queue.put(2, 1), 0..2);
        let hardware = Arc::clone(&queue);
        let consumer = thread::spawn(move || hardware.consume());
        let other = Arc::clone(&queue);
        let producer = thread::spawn(move || {
            let _ = other.follow();
            other.put(1, 2)
        });
        queue.follow().unwrap();
        let mine = queue.put(1, 3);
        let theirs = producer.join().unwrap();
        let mut seen = consumer.join().unwrap();
        seen.extend(queue.consume());
        let total = 2 + (mine.end - mine.start) + (theirs.end - theirs.start);
        assert_eq!(seen.len() as u64, total, "{seen:?}");
        assert_eq!(seen[..2], [1, 1]);
        assert_eq!(queue.follow(), Ok(total));
    });
}

#[test]
fn nothing_stays_behind_that_was_posted() {
    explore(2, || {
        let queue = Queue::new(2);
        let threads = [5, 6].map(|value| {
            let queue = Arc::clone(&queue);
            thread::spawn(move || queue.put(1, value))
        });
        queue.put(1, 7);
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(queue.ring.told(), 3);
        assert_eq!(queue.consume().len(), 3);
        assert_eq!(queue.follow(), Ok(3));
        assert!(queue.alone(1, 8).is_some() || queue.posted(1, 8).end == 4, "the short way opens again");
    });
}

#[test]
fn whoever_waits_comes_to_an_end_and_nobody_need_come_for_him() {
    explore(2, || {
        let queue = Queue::new(1);
        let other = Arc::clone(&queue);
        let waiter = thread::spawn(move || other.put_and_wait(5));
        let mine = queue.put_and_wait(6);
        let theirs = waiter.join().unwrap();
        assert_eq!(mine + theirs, 3);
        assert_eq!((queue.ring.told(), queue.ring.consumed()), (2, 2));
    });
}

#[test]
fn whoever_finds_the_short_way_taken_is_not_left_behind() {
    explore(3, || {
        let queue = Queue::new(1);
        let other = Arc::clone(&queue);
        let waiter = thread::spawn(move || other.put_and_wait(5));
        queue.put(1, 6);
        waiter.join().unwrap();
        assert_eq!(queue.ring.told(), 2);
        // Nobody is here, as everybody can see, one call later at most.
        queue.put_and_wait(7);
        assert!(!queue.ring.is_crowded() || queue.put_and_wait(8) == 4 && !queue.ring.is_crowded());
    });
}

#[test]
fn what_is_posted_while_others_wait_is_told_too() {
    explore(2, || {
        let queue = Queue::new(2);
        let [waiting, posting] = [0; 2].map(|_| Arc::clone(&queue));
        let waiter = thread::spawn(move || waiting.put_and_wait(5));
        let poster = thread::spawn(move || posting.posted(1, 6));
        poster.join().unwrap();
        waiter.join().unwrap();
        assert_eq!(queue.ring.told(), 2);
    });
}

#[test]
fn who_is_on_the_short_way_is_told_of_what_went_wrong_before_the_hardware_went_on() {
    explore(3, || {
        let queue = Queue::new(1);
        let other = Arc::clone(&queue);
        // Stops at the entry, and goes on when that has been noted.
        let hardware = thread::spawn(move || {
            if other.prod.load(Acquire) == 1 {
                other.ring.disturb();
                other.cons.store(1, Release);
            }
        });
        let run = queue.ring.claim_alone(queue.ring.next(), 1).unwrap();
        queue.ring.telling(run.end);
        queue.tell(1);
        let consumed = queue.cons.load(Acquire) == 1;
        let undisturbed = queue.ring.leave_alone(run.end);
        hardware.join().unwrap();
        assert!(!(consumed && undisturbed), "taken for done");
    });
}

#[test]
fn what_the_hardware_is_told_of_has_been_written() {
    explore(3, || {
        let queue = Queue::new(2);
        let threads = [5, 6].map(|value| {
            let queue = Arc::clone(&queue);
            thread::spawn(move || queue.put(1, value))
        });
        // While they are at it: nothing but the bell's own register comes between a producer and the hardware.
        let early = queue.consume();
        assert!(early.iter().all(|value| [5, 6].contains(value)), "{early:?}");
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(early.len() + queue.consume().len(), 2);
    });
}

#[test]
fn what_one_has_seen_consumed_another_may_overwrite() {
    explore(3, || {
        let queue = Queue::new(0);
        assert_eq!(queue.put(1, 1), 0..1);
        let [hardware, follower, producer] = [0; 3].map(|_| Arc::clone(&queue));
        // In this order, so that the way that matters is the first that loom takes.
        let hardware = thread::spawn(move || hardware.consume());
        let follower = thread::spawn(move || follower.follow());
        // Does not look at the hardware's index: whatever room there is, the follower has made.
        let producer = thread::spawn(move || producer.put(1, 2));
        let theirs = producer.join().unwrap();
        assert!(follower.join().unwrap().is_ok());
        let seen = hardware.join().unwrap();
        assert_eq!(seen[0], 1);
        assert_eq!(seen.len() + queue.consume().len(), 1 + (theirs.end - theirs.start) as usize);
    });
}

#[test]
fn what_is_known_as_consumed_is_over() {
    explore(3, || {
        let queue = Queue::new(0);
        assert_eq!(queue.put(1, 1), 0..1);
        let [hardware, follower, other] = [0; 3].map(|_| Arc::clone(&queue));
        let hardware = thread::spawn(move || hardware.consume());
        let follower = thread::spawn(move || follower.follow());
        let other = thread::spawn(move || {
            if other.ring.consumed() == 1 {
                // SAFETY: loom checks that nobody else is at it.
                #[allow(unsafe_code)]
                other.slots[0].with_mut(|slot| unsafe { *slot = 2 });
            }
        });
        other.join().unwrap();
        assert!(follower.join().unwrap().is_ok());
        assert_eq!(hardware.join().unwrap(), [1]);
    });
}

#[test]
fn an_index_is_not_read_before_what_it_is_compared_with() {
    explore(3, || {
        let queue = Queue::new(1);
        let [producer, follower] = [0; 2].map(|_| Arc::clone(&queue));
        let producer = thread::spawn(move || {
            producer.put(2, 1);
            producer.consume();
            producer.follow().unwrap();
        });
        let follower = thread::spawn(move || follower.follow());
        let seen = follower.join().unwrap();
        producer.join().unwrap();
        assert!(seen.is_ok_and(|position| position <= 2), "{seen:?}");
    });
}

#[test]
fn an_index_is_believed_exactly_as_far_as_it_can_be_true() {
    explore(2, || {
        let queue = Queue::new(1);
        let other = Arc::clone(&queue);
        let producer = thread::spawn(move || {
            other.put(2, 1);
            other.consume();
            other.follow().unwrap();
            other.put(2, 2);
            other.consume();
        });
        // An honest index is believed at every moment.
        assert!(queue.follow().unwrap() <= 4);
        producer.join().unwrap();
        assert_eq!(queue.follow(), Ok(4));
        assert_eq!(queue.ring.follow(|| 1), Err(BadIndex));
        assert_eq!(queue.ring.consumed(), 4);
    });
}

#[test]
fn a_closed_queue_takes_nothing_until_it_is_opened() {
    explore(2, || {
        let queue = Queue::new(2);
        let other = Arc::clone(&queue);
        let closer = thread::spawn(move || other.ring.close());
        let first = queue.ring.claim(1);
        closer.join().unwrap();
        assert!(matches!(first, Ok(_) | Err(Closed)));
        assert_eq!(queue.ring.claim(1), Err(Closed));
        queue.ring.open();
        let start = first.map_or(0, |run| run.end);
        assert_eq!(queue.ring.claim(9), Ok(start..4));
        assert_eq!(queue.ring.claim(1), Ok(4..4));
    });
}

#[test]
fn runs_of_all_lengths_go_around_many_times() {
    use core::sync::atomic::AtomicU64;
    for log2 in [0, 1, 3, 8] {
        let ring = Ring::<AtomicU64>::new(QueueSize::new(log2), true).unwrap();
        let (told, mut total) = (core::cell::Cell::new(0), 0);
        for round in 0..5000_u64 {
            let run = ring.post(1 + round % 7).unwrap();
            assert_eq!(run.start, total);
            total = run.end;
            if !run.is_empty() {
                ring.finish(run);
            }
            ring.ring(|index| told.set(index));
            assert_eq!(ring.told(), total);
            assert_eq!(told.get(), ring.index(total));
            if round % 3 == 0 || round % 7 == 6 {
                assert_eq!(ring.follow(|| told.get()), Ok(total));
            }
        }
        assert!(total > 4 << log2);
    }
}
